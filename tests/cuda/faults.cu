// Kernels with one fault each, which the emulator has to find.
#include "../../csrc/cuda/launch.h"

namespace {

struct Fault {
  int* out;
};

// The neighbour's number is read with no barrier after it was written.
__global__ void missing_barrier(Fault fault) {
  __shared__ int number[64];
  number[threadIdx.x] = static_cast<int>(threadIdx.x);
  fault.out[threadIdx.x] = number[(threadIdx.x + 1) % 64];
}

__global__ void missing_warp_barrier(Fault fault) {
  __shared__ int number[64];
  number[threadIdx.x] = static_cast<int>(threadIdx.x);
  fault.out[threadIdx.x] = number[threadIdx.x ^ 1];
}

__global__ void with_barrier(Fault fault) {
  __shared__ int number[64];
  number[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  fault.out[threadIdx.x] = number[(threadIdx.x + 1) % 64];
}

__global__ void half_of_shared_memory_never_written(Fault fault) {
  __shared__ int number[64];
  if (threadIdx.x % 2) number[threadIdx.x] = 1;
  __syncthreads();
  fault.out[threadIdx.x] = number[threadIdx.x];
}

__global__ void barrier_that_some_leave_before(Fault) {
  if (threadIdx.x < 7) return;
  __syncthreads();
}

__global__ void two_barriers(Fault) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void shuffle_that_some_miss(Fault fault) {
  if (threadIdx.x % 32 < 16) fault.out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, fault.out[threadIdx.x], 1);
}

__global__ void shuffle_from_outside(Fault fault) {
  if (threadIdx.x % 32 < 16) fault.out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, fault.out[threadIdx.x], 16);
}

}  // namespace

// Runs a fault on 64 threads; null, or what the emulator says.
extern "C" __attribute__((visibility("default"))) const char* run_fault(const char* name, int* out) {
  const Fault fault{out};
#define FAULT(kernel) \
  if (!strcmp(name, #kernel)) return LOCKIN_FAST_LAUNCH(kernel, 1, 64, 0, nullptr, fault)
  FAULT(missing_barrier);
  FAULT(missing_warp_barrier);
  FAULT(with_barrier);
  FAULT(half_of_shared_memory_never_written);
  FAULT(barrier_that_some_leave_before);
  FAULT(two_barriers);
  FAULT(shuffle_that_some_miss);
  FAULT(shuffle_from_outside);
#undef FAULT
  return "no such fault";
}
