#include "../cpu/prefix_matching.h"

#include <limits>
#include <vector>

#include "tensors.h"

namespace lockin_fast {
namespace {

// One row of tokens: ids that fit a vector lane, and the positions that have an earlier occurrence of their token.
struct Row {
  std::vector<int32_t> tokens, before, queries;
};

Row row_of(const int64_t* tokens, int64_t length) {
  std::vector<int64_t> distinct(tokens, tokens + length);
  std::sort(distinct.begin(), distinct.end());
  distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
  std::vector<bool> seen(distinct.size());
  Row row;
  int32_t previous = -1;
  for (int64_t t = 0; t < length; ++t) {
    const auto rank = std::lower_bound(distinct.begin(), distinct.end(), tokens[t]) - distinct.begin();
    row.before.push_back(previous);
    row.tokens.push_back(previous = static_cast<int32_t>(rank));
    if (seen[rank]) row.queries.push_back(static_cast<int32_t>(t));
    seen[rank] = true;
  }
  return row;
}

const char* head(const Tensor& t, int64_t batch, int64_t index) {
  const int64_t offset = batch * t.stride(0) + index * t.stride(1);
  return static_cast<const char*>(t.const_data_ptr()) + offset * static_cast<int64_t>(t.element_size());
}

Tensor with_unit_stride(const Tensor& t) {
  return t.size(3) <= 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
}

Tensor prefix_matching(const Tensor& q_in, const Tensor& k_in, const Tensor& tokens_in, double scale) {
  STD_TORCH_CHECK(q_in.dim() == 4 && k_in.dim() == 4 && q_in.is_cpu() && k_in.is_cpu(),
                  "q and k must be [B, heads, T, D] on the CPU");
  const int64_t batch = q_in.size(0), heads = q_in.size(1), length = q_in.size(2), groups = k_in.size(1);
  check_same_dtype(k_in, "k", q_in, "q");
  STD_TORCH_CHECK(k_in.size(0) == batch && k_in.size(2) == length && k_in.size(3) == q_in.size(3) && groups > 0 &&
                      heads % groups == 0,
                  "k must be [B, Hkv, T, D] as q, with Hkv a divisor of its heads");
  STD_TORCH_CHECK(tokens_in.scalar_type() == ScalarType::Long, "tokens must be int64");
  check_matrix(tokens_in, "tokens", batch, length);
  STD_TORCH_CHECK(length < std::numeric_limits<int32_t>::max(), "T must be less than 2^31");
  const Tensor q = with_unit_stride(q_in), k = with_unit_stride(k_in), tokens = torch::stable::contiguous(tokens_in);

  static const auto block = LOCKIN_FAST_CHOOSE(prefix_matching_queries)();
  static const auto room = LOCKIN_FAST_CHOOSE(prefix_matching_room);
  static const auto kernel = LOCKIN_FAST_CHOOSE(prefix_matching);
  Tensor scores = empty_floats({batch, heads});
  float* out = static_cast<float*>(scores.mutable_data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    const Row row = row_of(static_cast<const int64_t*>(tokens.const_data_ptr()) + b * length, length);
    const int64_t count = static_cast<int64_t>(row.queries.size()), blocks = (count + block - 1) / block;
    std::vector<double> mass(static_cast<size_t>(heads * blocks));
    torch::stable::parallel_for(0, heads * blocks, 1, [&](int64_t first, int64_t last) {
      const Room scratch(room(q.size(3)));
      for (int64_t i = first; i < last; ++i) {
        const int64_t h = i / blocks, start = i % blocks * block;
        PrefixMatchingArgs args{};
        args.dtype = dtype_of(q, "q");
        args.q = head(q, b, h);
        args.q_stride = q.stride(2);
        args.k = head(k, b, h / (heads / groups));
        args.k_stride = k.stride(2);
        args.width = q.size(3);
        args.scale = static_cast<float>(scale);
        args.tokens = row.tokens.data();
        args.before = row.before.data();
        mass[i] = kernel(args, row.queries.data() + start, std::min(block, count - start), scratch.data);
      }
    });
    for (int64_t h = 0; h < heads; ++h) {
      double total = 0.0;
      for (int64_t i = h * blocks; i < (h + 1) * blocks; ++i) total += mass[i];
      out[b * heads + h] = static_cast<float>(total / static_cast<double>(count));  // 0 / 0 where nothing is repeated
    }
  }
  return scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lockin_fast, CPU, library) {
  library.impl("prefix_matching", TORCH_BOX(&prefix_matching));
}

}  // namespace lockin_fast
