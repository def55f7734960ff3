// The one way a kernel is launched. A kernel is a __global__ function of one plain struct, so that a host emulation of
// CUDA can define the macro for itself and run the same sources on the CPU.
#pragma once

#include <cstdint>

#ifndef LOCKIN_FAST_LAUNCH
#include <cuda_runtime.h>

// Null, or what went wrong with the launch; nothing waits for the kernel.
#define LOCKIN_FAST_LAUNCH(kernel, grid, block, shared_bytes, stream, params) \
  (kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params), ::lockin_fast::launch_error())

namespace lockin_fast {

inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Of the current device; 1 where it cannot be asked, and then the launch says why.
inline int multiprocessors() {
  int device = 0, count = 1;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

}  // namespace lockin_fast
#endif
