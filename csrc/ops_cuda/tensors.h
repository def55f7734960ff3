// What the CUDA op wrappers share: argument checks, outputs, and the launch on the right device and stream.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "../common/half.h"
#include "registration.h"

namespace lockin_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::BFloat16: return Dtype::bf16;
    default: STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16");
  }
}

inline Tensor empty_beside(const Tensor& t, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(t, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype);
}

inline void check_device(const Tensor& t, const char* name, const Tensor& other, const char* other_name) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == other.get_device_index(), name, " must be on the device of ",
                  other_name);
}

inline void check_matrix(const Tensor& t, const char* name, int64_t rows, int64_t columns, ScalarType dtype) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, " must have shape [", rows, ", ",
                  columns, "]");
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " has the wrong dtype");
}

inline void check_vector(const Tensor& t, const char* name, int64_t length, ScalarType dtype) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == length && t.scalar_type() == dtype && t.is_contiguous(), name,
                  " must be a contiguous vector of ", length, " elements of its dtype");
}

// A vector with one number per row of `weight`, or null.
inline const float* latent_vector(const OptionalTensor& t, const char* name, const Tensor& weight) {
  if (!t) return nullptr;
  check_vector(*t, name, weight.size(0), ScalarType::Float);
  check_device(*t, name, weight, "weight");
  return static_cast<const float*>(t->const_data_ptr());
}

inline bool rows_are_contiguous(const Tensor& t) { return t.size(1) <= 1 || t.stride(1) == 1; }

// A matrix whose rows are contiguous; the row stride is free.
inline Tensor with_contiguous_rows(const Tensor& t) { return rows_are_contiguous(t) ? t : torch::stable::contiguous(t); }

inline int64_t row_stride_bytes(const Tensor& t) { return t.stride(0) * static_cast<int64_t>(t.element_size()); }

// Queues the kernel on the device of `t`, in torch's current stream there; nothing waits for it.
template <class Params>
void run(const char* (*kernel)(const Params&, void*), const Params& params, const Tensor& t) {
  const torch::stable::accelerator::DeviceGuard guard(t.get_device_index());
  const char* error = kernel(params, current_stream(t.get_device_index()));
  STD_TORCH_CHECK(!error, "the CUDA kernel could not be launched: ", error ? error : "");
}

}  // namespace lockin_fast
