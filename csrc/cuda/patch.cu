#include "patch.h"

#include "access.h"
#include "launch.h"

namespace lockin_fast {
namespace {

struct Copy {
  PatchParams patch;
  bool quads;
};

__device__ void copy_quads(char* to, const char* from, int64_t bytes, int lane) {
  for (int64_t piece = blockIdx.y * kPieceBytes; piece < bytes; piece += gridDim.y * kPieceBytes) {
    const int64_t first = piece + lane * kQuadBytes;
    Quad quads[kQuadsPerLane];
#pragma unroll
    for (int i = 0; i < kQuadsPerLane; i++) {
      const int64_t at = first + i * kWarp * kQuadBytes;
      if (at < bytes) quads[i] = *reinterpret_cast<const Quad*>(from + at);
    }
#pragma unroll
    for (int i = 0; i < kQuadsPerLane; i++) {
      const int64_t at = first + i * kWarp * kQuadBytes;
      if (at < bytes) *reinterpret_cast<Quad*>(to + at) = quads[i];
    }
  }
}

// Rows that 16 bytes do not fit: two bytes at a time, as every dtype allows.
__device__ void copy_pairs(char* to, const char* from, int64_t bytes, int lane) {
  for (int64_t piece = blockIdx.y * kPieceBytes; piece < bytes; piece += gridDim.y * kPieceBytes) {
    const int64_t end = piece + kPieceBytes < bytes ? piece + kPieceBytes : bytes;
    for (int64_t at = piece + 2 * lane; at < end; at += 2 * kWarp) {
      *reinterpret_cast<uint16_t*>(to + at) = *reinterpret_cast<const uint16_t*>(from + at);
    }
  }
}

__global__ void __launch_bounds__(kThreads) patch_kernel(Copy copy) {
  const PatchParams& p = copy.patch;
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp; i < p.count; i += warps) {
    const int64_t row = p.rows[i];
    if (row < 0 || row >= p.tokens) continue;
    char* to = p.h + row * p.h_stride;
    const char* from = p.source + i * p.source_stride;
    if (copy.quads) {
      copy_quads(to, from, p.row_bytes, lane);
    } else {
      copy_pairs(to, from, p.row_bytes, lane);
    }
  }
}

}  // namespace

const char* patch(const PatchParams& params, void* stream) {
  if (params.count == 0 || params.row_bytes == 0) return nullptr;
  const bool quads = in_quads(params.h, params.h_stride, params.row_bytes) &&
                     in_quads(params.source, params.source_stride, params.row_bytes);
  const Copy copy{params, quads};
  return LOCKIN_FAST_LAUNCH(patch_kernel, grid_of_rows(params.count, pieces_of(params.row_bytes)), kThreads, 0, stream,
                            copy);
}

}  // namespace lockin_fast
