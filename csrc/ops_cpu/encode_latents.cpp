#include "../cpu/encode_latents.h"

#include "encode.h"

namespace lockin_fast {
namespace {

Tensor encode_latents(const Tensor& h, const Tensor& weight, const Tensor& bias, const OptionalTensor& threshold) {
  STD_TORCH_CHECK(h.dim() == 2 && weight.dim() == 2, "h must be [T, d] and weight [K, d]");
  Tensor out = empty_floats({h.size(0), weight.size(0)});
  const Encode encode = packed_args(h, weight, bias, threshold, out);
  static const auto kernel = LOCKIN_FAST_CHOOSE(encode_latents);
  for_token_tiles(h.size(0), [&](int64_t begin, int64_t end) { kernel(encode.args, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lockin_fast, CPU, library) {
  library.impl("encode_latents", TORCH_BOX(&encode_latents));
}

}  // namespace lockin_fast
