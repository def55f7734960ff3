// The arguments of an encode, checked, with what they point at kept alive.
#pragma once

#include "../cpu/encode_latents.h"
#include "tensors.h"

namespace lockin_fast {

// Keeps what EncodeArgs points at alive.
struct Encode {
  Tensor h, weight;
  Room room;
  EncodeArgs args;
};

inline Encode encode_args(const Tensor& h, const Tensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& threshold, int64_t packed_rows) {
  STD_TORCH_CHECK(h.is_cpu(), "h must be on the CPU");
  const int64_t latents = weight.size(0);
  check_matrix(weight, "weight", latents, h.size(1));
  check_same_dtype(weight, "weight", h, "h");
  Room room(packed_rows * padded(h.size(1)) * static_cast<int64_t>(h.element_size()));
  Encode encode{with_contiguous_rows(h), with_contiguous_rows(weight), std::move(room), {}};
  encode.args = {dtype_of(h, "h"),
                 encode.h.const_data_ptr(),
                 encode.h.stride(0),
                 encode.weight.const_data_ptr(),
                 encode.weight.stride(0),
                 float_vector(bias, "bias", latents),
                 float_vector(threshold, "threshold", latents),
                 latents,
                 h.size(1),
                 encode.room.data,
                 nullptr};
  return encode;
}

inline void pack_weight(const EncodeArgs& args) {
  static const auto units = LOCKIN_FAST_CHOOSE(pack_units);
  static const auto kernel = LOCKIN_FAST_CHOOSE(pack);
  torch::stable::parallel_for(0, units(args), 8, [&](int64_t first, int64_t last) { kernel(args, first, last); });
}

// As encode_args for a few latents: the weight packed, results to `out`.
inline Encode packed_args(const Tensor& h, const Tensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& threshold, const Tensor& out) {
  Encode encode = encode_args(h, weight, bias, threshold, weight.size(0));
  encode.args.out = static_cast<float*>(out.mutable_data_ptr());
  pack_weight(encode.args);
  return encode;
}

}  // namespace lockin_fast
