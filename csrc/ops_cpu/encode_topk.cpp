#include "../cpu/encode_topk.h"

#include <functional>
#include <tuple>
#include <vector>

#include "../common/half.h"
#include "wide.h"

namespace lockin_fast {
namespace {

constexpr int64_t kKeptBytes = int64_t{32} << 20;  // of all threads; more tokens are taken one lot after the other

// The k largest of the keys that each share of the latents kept, in order.
void merge(const std::vector<uint64_t>& kept, int64_t shares, int64_t tokens, int64_t k, float* values,
           int64_t* indices) {
  torch::stable::parallel_for(0, tokens, kTokenTile, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> keys(static_cast<size_t>(shares * k));
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t s = 0; s < shares; ++s) {
        std::copy_n(kept.begin() + (s * tokens + t) * k, k, keys.begin() + s * k);
      }
      std::partial_sort(keys.begin(), keys.begin() + k, keys.end(), std::greater<>());
      for (int64_t i = 0; i < k; ++i) {
        values[t * k + i] = float_from_bits(key_bits(keys[static_cast<size_t>(i)]));
        indices[t * k + i] = key_index(keys[static_cast<size_t>(i)]);
      }
    }
  });
}

std::tuple<Tensor, Tensor> encode_topk(const Tensor& h, const Tensor& weight, const Tensor& bias,
                                       const OptionalTensor& threshold, int64_t k) {
  const Wide wide = wide_args(h, weight, bias, {}, threshold, {});
  const int64_t tokens = h.size(0), latents = weight.size(0), units = wide_units(latents);
  STD_TORCH_CHECK(k >= 0 && k <= latents, "k must be from 0 to the number of latents");
  STD_TORCH_CHECK(latents < static_cast<int64_t>(kLowWord), "weight has more rows than fit an index of 32 bits");
  Tensor values = empty_floats({tokens, k});
  const int64_t shape[] = {tokens, k};
  Tensor indices = torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape, 2), ScalarType::Long);
  if (tokens == 0 || k == 0) return {values, indices};

  static const auto kernel = LOCKIN_FAST_CHOOSE(encode_topk);
  const int64_t shares = std::min<int64_t>(torch::stable::get_num_threads(), units);
  const int64_t lot = std::clamp<int64_t>(kKeptBytes / (shares * k * 8), 1, tokens);
  std::vector<uint64_t> kept(static_cast<size_t>(shares * lot * k));
  std::vector<float> floor(static_cast<size_t>(shares * lot));
  for (int64_t t0 = 0; t0 < tokens; t0 += lot) {
    EncodeTopkArgs args{wide.args, k, nullptr, nullptr};
    args.wide.tokens = std::min(lot, tokens - t0);
    const int64_t offset = t0 * wide.args.encode.h_stride * static_cast<int64_t>(h.element_size());
    args.wide.encode.h = static_cast<const char*>(wide.args.encode.h) + offset;
    std::fill(kept.begin(), kept.end(), 0);
    torch::stable::parallel_for(0, shares, 1, [&](int64_t first, int64_t last) {
      const Room packed(wide.lot_bytes);
      for (int64_t s = first; s < last; ++s) {
        EncodeTopkArgs share = args;
        share.kept = kept.data() + s * args.wide.tokens * k;
        share.floor = floor.data() + s * args.wide.tokens;
        kernel(share, units * s / shares * kWideUnit, std::min(units * (s + 1) / shares * kWideUnit, latents),
               packed.data);
      }
    });
    merge(kept, shares, args.wide.tokens, k, static_cast<float*>(values.mutable_data_ptr()) + t0 * k,
          static_cast<int64_t*>(indices.mutable_data_ptr()) + t0 * k);
  }
  return {values, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lockin_fast, CPU, library) {
  if (wide_products_pay()) library.impl("encode_topk", TORCH_BOX(&encode_topk));
}

}  // namespace lockin_fast
