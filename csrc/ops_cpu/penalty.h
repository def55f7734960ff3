// What the ops of the block penalty share, wherever their reference comes from.
#pragma once

#include <atomic>
#include <memory>
#include <tuple>

#include "../cpu/block_penalty.h"
#include "encode.h"

namespace lockin_fast {

// Outputs, and the arguments of the kernel but for the reference; keeps what they point at alive.
struct Penalty {
  Tensor per_token, coefficient, active;
  Encode encode;
  BlockPenaltyArgs args;
};

inline Penalty penalty_args(const Tensor& h, const Tensor& weight, const Tensor& bias, const Tensor& sign,
                            const OptionalTensor& mask, const OptionalTensor& threshold, const OptionalTensor& margin,
                            bool mean) {
  STD_TORCH_CHECK(h.dim() == 2 && weight.dim() == 2, "h must be [T, d] and weight [K, d]");
  const int64_t tokens = h.size(0), latents = weight.size(0);
  Tensor coefficient = empty_floats({tokens, latents});
  Encode encode = packed_args(h, weight, bias, threshold, coefficient);
  Penalty penalty{empty_floats({tokens}), coefficient, torch::stable::empty({}, ScalarType::Long), std::move(encode), {}};
  BlockPenaltyArgs& args = penalty.args;
  args.encode = penalty.encode.args;
  args.mask = token_mask(mask, tokens);
  args.sign = float_vector(sign, "sign", latents);
  args.margin = float_vector(margin, "margin", latents);
  args.unit = mean && latents > 0 ? 1.0f / static_cast<float>(latents) : 1.0f;
  args.per_token = static_cast<float*>(penalty.per_token.mutable_data_ptr());
  return penalty;
}

// kernel(begin, end, scratch) returns the active pairs of these tokens.
template <class Kernel>
std::tuple<Tensor, Tensor, Tensor> penalise(Penalty& penalty, Kernel kernel) {
  std::atomic<int64_t> pairs{0};
  for_token_tiles(penalty.per_token.size(0), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[kPenaltyScratch * penalty.args.encode.latents]);
    pairs += kernel(begin, end, scratch.get());
  });
  *static_cast<int64_t*>(penalty.active.mutable_data_ptr()) = pairs;
  return {penalty.per_token, penalty.coefficient, penalty.active};
}

}  // namespace lockin_fast
