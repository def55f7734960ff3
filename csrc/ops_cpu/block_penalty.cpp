#include "../cpu/block_penalty.h"

#include <atomic>
#include <memory>
#include <tuple>

#include "encode.h"

namespace lockin_fast {
namespace {

std::tuple<Tensor, Tensor, Tensor> block_penalty(const Tensor& h, const Tensor& weight, const Tensor& bias,
                                                 const Tensor& sign, const OptionalTensor& z_ref,
                                                 const OptionalTensor& h_ref, const OptionalTensor& mask,
                                                 const OptionalTensor& threshold, const OptionalTensor& margin,
                                                 bool mean) {
  STD_TORCH_CHECK(h.dim() == 2 && weight.dim() == 2, "h must be [T, d] and weight [K, d]");
  STD_TORCH_CHECK(z_ref.has_value() != h_ref.has_value(), "exactly one of z_ref and h_ref must be given");
  const int64_t tokens = h.size(0), latents = weight.size(0);
  Tensor per_token = empty_floats({tokens});
  Tensor coefficient = empty_floats({tokens, latents});
  Tensor active = torch::stable::empty({}, ScalarType::Long);
  const Encode encode = packed_args(h, weight, bias, threshold, coefficient);

  BlockPenaltyArgs args{};
  args.encode = encode.args;
  OptionalTensor reference;  // keeps what args points at alive
  if (h_ref) {
    reference = reference_rows(*h_ref, h);
    args.h_ref = reference->const_data_ptr();
    args.h_ref_stride = reference->stride(0);
  } else {
    check_matrix(*z_ref, "z_ref", tokens, latents);
    STD_TORCH_CHECK(z_ref->scalar_type() == ScalarType::Float, "z_ref must be float32");
    reference = torch::stable::contiguous(*z_ref);
    args.z_ref = static_cast<const float*>(reference->const_data_ptr());
  }
  args.mask = token_mask(mask, tokens);
  args.sign = float_vector(sign, "sign", latents);
  args.margin = float_vector(margin, "margin", latents);
  args.unit = mean && latents > 0 ? 1.0f / static_cast<float>(latents) : 1.0f;
  args.per_token = static_cast<float*>(per_token.mutable_data_ptr());

  static const auto kernel = LOCKIN_FAST_CHOOSE(block_penalty);
  std::atomic<int64_t> pairs{0};
  for_token_tiles(tokens, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[kPenaltyScratch * latents]);
    pairs += kernel(args, begin, end, scratch.get());
  });
  *static_cast<int64_t*>(active.mutable_data_ptr()) = pairs;
  return {per_token, coefficient, active};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lockin_fast, CPU, library) {
  library.impl("block_penalty", TORCH_BOX(&block_penalty));
}

}  // namespace lockin_fast
