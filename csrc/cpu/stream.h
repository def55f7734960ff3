// Copies past the caches, for destinations larger than these: no line is read before it is written over.
#pragma once

#include "vec.h"

namespace lockin_fast {
namespace {

// A copy of `bytes`, its whole lines stored past the caches. A thread calls finish_streams() after its last one.
LOCKIN_FAST_LOCAL void stream_bytes(char* to, const char* from, int64_t bytes) {
#if LOCKIN_FAST_LEVEL >= 2
  constexpr int64_t kLine = 64;
  const int64_t ahead = -static_cast<int64_t>(reinterpret_cast<uintptr_t>(to)) & (kLine - 1);
  const int64_t head = ahead < bytes ? ahead : bytes;
  memcpy(to, from, static_cast<size_t>(head));
  int64_t i = head;
  for (; i + kLine <= bytes; i += kLine) {
#if LOCKIN_FAST_LEVEL >= 3
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
#else
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i + kLine / 2));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), low);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i + kLine / 2), high);
#endif
  }
  memcpy(to + i, from + i, static_cast<size_t>(bytes - i));
#else
  memcpy(to, from, static_cast<size_t>(bytes));
#endif
}

// Makes what was streamed visible to the threads that this one hands over to.
LOCKIN_FAST_LOCAL void finish_streams() {
#if LOCKIN_FAST_LEVEL >= 2
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace lockin_fast
