// How kernels reach rows of memory: a warp takes a row, or a piece of one, 16 bytes per lane at a time.
#pragma once

#include <cstdint>

#include "../common/half.h"

namespace lockin_fast {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 8;
constexpr int kThreads = kWarp * kWarpsPerBlock;

// What a lane has in flight at once, and so the piece of a row that a warp takes at a time.
constexpr int kQuadsPerLane = 4;
constexpr int64_t kQuadBytes = 16;
constexpr int64_t kPieceBytes = kQuadBytes * kWarp * kQuadsPerLane;

struct alignas(16) Quad {
  uint32_t word[4];
};

// The blocks that let every warp take one row (along x) and one piece of it (along y); kernels stride over the rest.
inline dim3 grid_of_rows(int64_t rows, int64_t pieces) {
  const int64_t blocks = (rows + kWarpsPerBlock - 1) / kWarpsPerBlock;
  return dim3(static_cast<unsigned>(blocks < 65536 ? blocks : 65536), static_cast<unsigned>(pieces < 256 ? pieces : 256));
}

inline int64_t pieces_of(int64_t row_bytes) { return (row_bytes + kPieceBytes - 1) / kPieceBytes; }

// Whether rows can be read 16 bytes at a time: where they begin, how far apart they are, and their length.
inline bool in_quads(const void* data, int64_t stride_bytes, int64_t row_bytes) {
  return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(stride_bytes | row_bytes)) % kQuadBytes == 0;
}

}  // namespace lockin_fast
