// What every kernel's arguments share. The op wrappers hand over plain pointers and sizes, checked and allocated by them.
//
// Strides are in elements. A kernel works on tokens [begin, end), so the caller decides how tokens are shared out; a
// token's result never depends on that choice.
#pragma once

#include <cstdint>

#include "../common/half.h"

namespace lockin_fast {

// Tokens a kernel takes at a time; the caller's grain is a multiple of it.
constexpr int64_t kTokenTile = 32;

// A packed weight has its width rounded up to this.
constexpr int64_t kWidthPadding = 256;

}  // namespace lockin_fast

// Declares an entry point of every instruction-set unit, each in its own namespace; the kernel's source defines it in
// LOCKIN_FAST_UNIT and is compiled once per unit.
#define LOCKIN_FAST_DECLARE(returns, name, ...)     \
  namespace baseline {                              \
  returns name(__VA_ARGS__);                        \
  }                                                 \
  namespace avx2 {                                  \
  returns name(__VA_ARGS__);                        \
  }                                                 \
  namespace avx512 {                                \
  returns name(__VA_ARGS__);                        \
  }                                                 \
  namespace avx512bf16 {                            \
  returns name(__VA_ARGS__);                        \
  }
