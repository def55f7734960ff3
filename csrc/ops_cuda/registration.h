// Which ops this library serves, and the stream it works in.
#pragma once

#include <cstdint>

namespace lockin_fast {

// Whether LOCKIN_FAST_CUDA_OPS, a list separated by commas, names `op` while the library loads; unset names all.
// An op has one kernel per device, and Triton may be the faster one.
bool asked_for(const char* op);

// torch's current stream on a CUDA device, as a cudaStream_t.
void* current_stream(int32_t device);

}  // namespace lockin_fast
