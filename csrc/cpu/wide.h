// What the kernels over a whole SAE share: how its latents are shared out, and the memory a thread needs.
#pragma once

#include "encode_latents.h"

namespace lockin_fast {

// The functions have internal linkage: no unit lends another its instructions.

// Latents that threads share out.
constexpr int64_t kWideUnit = 40;

static inline int64_t wide_units(int64_t latents) { return (latents + kWideUnit - 1) / kWideUnit; }

// Packed latents that a thread holds at a time; it runs through all tokens once for each lot, so a larger one means
// that the tokens are read from memory less often.
constexpr int64_t kPackedBytes = int64_t{3} << 20;

struct WideArgs {
  EncodeArgs encode;  // out and packed are not used
  const void* h_ref;  // [T, d] a second stream, or null
  int64_t h_ref_stride;
  const bool* mask;   // [T] or null
  int64_t tokens;     // T
  const int64_t* ends;  // of segments of consecutive tokens, ascending to T, or null: all tokens are one
};

// Latents of a lot, at least one unit.
static inline int64_t wide_lot(int64_t width, int64_t element_size) {
  const int64_t row = (width + kWidthPadding - 1) / kWidthPadding * kWidthPadding * element_size;
  const int64_t units = kPackedBytes / (kWideUnit * (row > 0 ? row : 1));
  return kWideUnit * (units > 1 ? units : 1);
}

}  // namespace lockin_fast
