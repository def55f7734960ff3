// One warp's tensor-core product: d += a b, 16 x 16 by 16 x 8, operands of 16 bits, sums in fp32.
//
// Lane 4g + q holds, two neighbouring columns a register: of a the rows g, g + 8, g, g + 8 at columns 2q, 2q, 2q + 8,
// 2q + 8; of b the rows 2q, 2q + 8 of column g; of d the columns 2q, 2q + 1 of row g, then of row g + 8.
#pragma once

#include "../common/half.h"

namespace lockin_fast {

#ifdef EMULATED_MMA_16X8X16
template <class T>
void mma_16x8x16(T, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  EMULATED_MMA_16X8X16(d, a, b, static_cast<float (*)(T)>(to_float));
}
#else
#define LOCKIN_FAST_MMA(type)                                                                      \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, "    \
               "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                     \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

__device__ __forceinline__ void mma_16x8x16(bf16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  LOCKIN_FAST_MMA("bf16");
}

__device__ __forceinline__ void mma_16x8x16(f16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  LOCKIN_FAST_MMA("f16");
}
#undef LOCKIN_FAST_MMA
#endif

}  // namespace lockin_fast
