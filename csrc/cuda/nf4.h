// Rows of hidden states to and from NF4, outlier channels kept beside.
#pragma once

#include "../common/half.h"
#include "nf4_rows.h"

namespace lockin_fast {

struct Nf4QuantizeParams {
  Dtype dtype;              // of h and outliers
  const void* h;            // [tokens, width]
  int64_t h_stride;         // in elements
  const int32_t* channels;  // [channel_count] ascending, or null
  int64_t channel_count;
  int64_t tokens;
  int64_t width;            // a multiple of blocksize
  int64_t blocksize;        // a power of two from kNf4SmallestBlock to kNf4LargestBlock
  uint8_t* codes;           // [tokens, width / 2]
  float* absmax;            // [tokens, width / blocksize]
  void* outliers;           // [tokens, channel_count]
};

constexpr int64_t kNf4SmallestBlock = 16, kNf4LargestBlock = 4096;

struct Nf4DecodeParams {
  Dtype dtype;          // of out and the outliers
  Nf4Rows nf4;
  int64_t count;        // rows in NF4
  int64_t width;        // as above
  const int64_t* rows;  // [count], where each goes; one outside [0, out_rows) is skipped. Null: row i goes to row i
  void* out;            // [out_rows, width]
  int64_t out_stride;   // in elements
  int64_t out_rows;
};

// Null, or why the launch failed.
const char* nf4_quantize(const Nf4QuantizeParams& params, void* stream);
const char* nf4_decode(const Nf4DecodeParams& params, void* stream);

}  // namespace lockin_fast
