// The arguments of a kernel over a whole SAE, checked, and where the compiled kernels serve.
#pragma once

#include "../cpu/wide.h"

#include <stdexcept>

#include "encode.h"

namespace lockin_fast {

// Keeps what WideArgs points at alive.
struct Wide {
  Encode encode;
  OptionalTensor reference;
  WideArgs args;
  int64_t lot_bytes;  // of packed latents, per thread
};

inline Wide wide_args(const Tensor& h, const Tensor& weight, const Tensor& bias, const OptionalTensor& h_ref,
                      const OptionalTensor& threshold, const OptionalTensor& mask) {
  STD_TORCH_CHECK(h.dim() == 2 && weight.dim() == 2, "h must be [T, d] and weight [F, d]");
  Wide wide{encode_args(h, weight, bias, threshold, 0), {}, {}, 0};
  if (h_ref) wide.reference = reference_rows(*h_ref, h);
  const OptionalTensor& reference = wide.reference;
  wide.args = {wide.encode.args, reference ? reference->const_data_ptr() : nullptr,
               reference ? reference->stride(0) : 0, token_mask(mask, h.size(0)), h.size(0), nullptr};
  const int64_t element_size = static_cast<int64_t>(h.element_size());
  wide.lot_bytes = wide_lot(h.size(1), element_size) * padded(h.size(1)) * element_size;
  return wide;
}

// Below AVX-512 torch's own product, tile by tile, is as fast or faster, so it stays the kernel there. A level that
// cannot be served is reported by the first op that is called; nothing may throw while a library loads.
inline bool wide_products_pay() {
  try {
    return chosen_isa() >= Isa::avx512;
  } catch (const std::runtime_error&) {
    return false;
  }
}

}  // namespace lockin_fast
