// Included first, makes the CUDA op wrappers serve CPU tensors, in a torch library of their own.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace torch::stable::accelerator {
struct NoDeviceGuard {
  explicit NoDeviceGuard(int64_t) {}
};
}  // namespace torch::stable::accelerator

namespace lockin_fast {
inline bool asked_for(const char*) { return true; }
inline void* current_stream(int32_t) { return nullptr; }
}  // namespace lockin_fast

#define DeviceGuard NoDeviceGuard
#define is_cuda is_cpu
#define CUDA CPU
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) _STABLE_TORCH_LIBRARY_IMPL(lockin_fast_emulated, key, m, C10_UID)
