#include "../cpu/routing_stats.h"

#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace lockin_fast {
namespace {

Tensor empty_of(std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype);
}

template <class Number>
Tensor filled(std::initializer_list<int64_t> shape, ScalarType dtype, const Number* values) {
  Tensor t = empty_of(shape, dtype);
  std::copy(values, values + t.numel(), static_cast<Number*>(t.mutable_data_ptr()));
  return t;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> routing_stats(const Tensor& logits, const OptionalTensor& classes,
                                                                 const OptionalTensor& mask, int64_t num_classes,
                                                                 int64_t top_k, bool sigmoid) {
  STD_TORCH_CHECK(logits.is_cpu() && logits.dim() == 2, "logits must be a [T, E] tensor on the CPU");
  const Tensor dense = with_contiguous_rows(logits);
  const int64_t tokens = dense.size(0), experts = dense.size(1);
  STD_TORCH_CHECK(top_k >= 1 && top_k <= experts && num_classes >= 0, "top_k must be 1 to E and num_classes 0 or more");
  STD_TORCH_CHECK(!classes || classes->numel() == tokens, "classes must have one entry per token");
  const int64_t chunks = (tokens + kRoutingChunk - 1) / kRoutingChunk;
  std::vector<double> probability(chunks * experts), entropy(chunks);
  std::vector<int64_t> counted(chunks), table((num_classes + 1) * experts);

  RoutingArgs args{};
  args.dtype = dtype_of(logits, "logits");
  args.logits = dense.const_data_ptr();
  args.stride = dense.stride(0);
  args.classes = classes ? indices(*classes, "classes") : nullptr;
  args.mask = token_mask(mask, tokens);
  args.tokens = tokens;
  args.experts = experts;
  args.num_classes = num_classes;
  args.top_k = top_k;
  args.sigmoid = sigmoid;
  args.probability = probability.data();
  args.entropy = entropy.data();
  args.counted = counted.data();
  static const auto floats = LOCKIN_FAST_CHOOSE(routing_floats);
  static const auto kernel = LOCKIN_FAST_CHOOSE(routing_stats);
  std::mutex merging;
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    const std::unique_ptr<float[]> room(new float[floats(experts) + top_k]);
    const std::unique_ptr<int32_t[]> chosen(new int32_t[top_k]);
    std::vector<int64_t> counts(table.size());
    for (int64_t c = first; c < last; ++c) kernel(args, c, {room.get(), chosen.get(), counts.data()});
    const std::lock_guard<std::mutex> lock(merging);
    for (size_t i = 0; i < counts.size(); ++i) table[i] += counts[i];
  });

  std::vector<double> probabilities(experts);
  std::vector<int64_t> load(experts);
  double total_entropy = 0.0;
  int64_t total = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    for (int64_t e = 0; e < experts; ++e) probabilities[e] += probability[c * experts + e];
    total_entropy += entropy[c];
    total += counted[c];
  }
  for (size_t i = 0; i < table.size(); ++i) load[i % experts] += table[i];
  return {filled({experts}, ScalarType::Double, probabilities.data()), filled({}, ScalarType::Double, &total_entropy),
          filled({experts}, ScalarType::Long, load.data()),
          filled({num_classes, experts}, ScalarType::Long, table.data()), filled({}, ScalarType::Long, &total)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lockin_fast, CPU, library) {
  library.impl("routing_stats", TORCH_BOX(&routing_stats));
}

}  // namespace lockin_fast
