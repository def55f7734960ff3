// What the CUDA op wrappers share: argument checks, outputs, and the launch on the right device and stream.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "registration.h"

namespace lockin_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void check_float(const Tensor& t, const char* name) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16, name,
                  " must be float32, float16 or bfloat16");
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
