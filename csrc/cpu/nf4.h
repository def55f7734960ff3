// Hidden states to and from NF4: two codes a byte, one fp32 scale per block of a row, outlier channels kept beside.
#pragma once

#include "kernels.h"

namespace lockin_fast {

// Rows of NF4, contiguous; `channels` in [0, width), ascending, or null.
struct Nf4Rows {
  const uint8_t* codes;     // [T, d / 2]
  const float* absmax;      // [T, d / blocksize]
  const int32_t* channels;  // [n] or null
  const void* outliers;     // [T, n], of the dtype that the rows are decoded to
  int64_t channel_count;
  int64_t width;            // d, a multiple of blocksize
  int64_t blocksize;        // a multiple of kNf4Step
};

constexpr int64_t kNf4Step = 16;

struct Nf4QuantizeArgs {
  Dtype dtype;              // of h and outliers
  const void* h;            // [T, d]
  int64_t h_stride;
  const int32_t* channels;  // as in Nf4Rows
  int64_t channel_count;
  int64_t width;
  int64_t blocksize;
  uint8_t* codes;
  float* absmax;
  void* outliers;
};

// `block` is scratch for one block of h; only needed where there are outlier channels.
LOCKIN_FAST_DECLARE(void, nf4_quantize, const Nf4QuantizeArgs&, int64_t begin, int64_t end, void* block)
LOCKIN_FAST_DECLARE(void, nf4_dequantize, const Nf4Rows&, Dtype, void* out, int64_t begin, int64_t end)

}  // namespace lockin_fast
