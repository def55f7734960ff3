// CUDA on the CPU, for the tests: csrc/cuda/*.cu compiled by g++ with this file included first.
//
// Every thread of a block is a fiber. One runs at a time, until it reaches a barrier or a warp-wide operation; which
// one goes next is shuffled by a seed, so that a missing __syncthreads or __syncwarp shows as a result that depends on
// the seed. Shared memory is filled with NaN before each block. Threads that meet different barriers, that leave while
// others wait, or that never meet, are an error, as is reading a lane that took no part.
//
// Not emulated: the memory model (every write is seen at once, and no thread is stopped between two barriers), blocks
// that run side by side, dynamic shared memory, asynchronous copies, wgmma, the accumulation order inside a tensor-core
// product, fast-math approximations, bank conflicts, occupancy and time. What passes here can still fail on a GPU.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __constant__ [[maybe_unused]] static const
#define __shared__ static thread_local
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define EMULATED_VECTORS(scalar, name)                                                                        \
  struct __align__(2 * sizeof(scalar)) name##2 { scalar x, y; };                                              \
  struct __align__(4 * sizeof(scalar)) name##4 { scalar x, y, z, w; };                                        \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }                                        \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
EMULATED_VECTORS(float, float)
EMULATED_VECTORS(int32_t, int)
EMULATED_VECTORS(uint32_t, uint)
EMULATED_VECTORS(uint16_t, ushort)
EMULATED_VECTORS(uint8_t, uchar)
#undef EMULATED_VECTORS

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulator {

struct Place {
  const char* file;
  int line;
};

constexpr size_t kPayload = 64;

// What the lanes named in `lanes` brought to one warp-wide operation.
struct Meeting {
  uint32_t lanes;
  Place place;
  alignas(16) unsigned char payload[32][kPayload];
};

void sync_block(Place place);
// Waits for the lanes of `mask`, and hands out what each brought. The answer lives until the caller's next meeting.
const Meeting& meet(Place place, uint32_t mask, const void* payload, size_t bytes);
void fail(Place place, const char* what);
// Runs the grid; null, or what went wrong. The kernels have to be in the library of the emulator.
const char* launch(dim3 grid, dim3 block, const std::function<void()>& kernel);

inline uint32_t lane() {
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32;
}

template <class T>
T from(const Meeting& meeting, uint32_t lane) {
  if (!(meeting.lanes >> lane & 1u)) fail(meeting.place, "reads a lane that took no part");
  T value;
  memcpy(&value, meeting.payload[lane], sizeof(T));
  return value;
}

// A lane outside its segment of `width` lanes keeps its own value.
template <class T>
T shuffle(Place place, uint32_t mask, T value, int64_t source, uint32_t width) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  const Meeting& meeting = meet(place, mask, &value, sizeof(T));
  const int64_t first = lane() / width * width;
  return from<T>(meeting, source < first || source >= first + width ? lane() : static_cast<uint32_t>(source));
}

template <class T>
T shuffle_index(Place place, uint32_t mask, T value, uint32_t source, uint32_t width = 32) {
  return shuffle(place, mask, value, lane() / width * width + source % width, width);
}

template <class T>
T shuffle_xor(Place place, uint32_t mask, T value, uint32_t bits, uint32_t width = 32) {
  return shuffle(place, mask, value, lane() ^ bits, width);
}

template <class T>
T shuffle_down(Place place, uint32_t mask, T value, uint32_t by, uint32_t width = 32) {
  return shuffle(place, mask, value, int64_t{lane()} + by, width);
}

template <class T>
T shuffle_up(Place place, uint32_t mask, T value, uint32_t by, uint32_t width = 32) {
  return shuffle(place, mask, value, int64_t{lane()} - by, width);
}

inline uint32_t ballot(Place place, uint32_t mask, bool vote) {
  const Meeting& meeting = meet(place, mask, &vote, sizeof(vote));
  uint32_t votes = 0;
  for (uint32_t i = 0; i < 32; ++i) {
    if (meeting.lanes >> i & 1u) votes |= static_cast<uint32_t>(from<bool>(meeting, i)) << i;
  }
  return votes;
}

template <class T, class Combine>
T reduce(Place place, uint32_t mask, T value, const Combine& combine) {
  static_assert(sizeof(T) == 4 && static_cast<T>(0.5) == T{}, "warp reductions are for 32-bit integers");
  const Meeting& meeting = meet(place, mask, &value, sizeof(T));
  T all = value;
  for (uint32_t i = 0; i < 32; ++i) {
    if (meeting.lanes >> i & 1u && i != lane()) all = combine(all, from<T>(meeting, i));
  }
  return all;
}

// mma.m16n8k16, row by column, fp32 accumulators, on the fragments of PTX ISA 9.7.14: lane 4g + q holds
//   a: rows g, g + 8, g, g + 8 at columns 2q, 2q, 2q + 8, 2q + 8 and the next; b: rows 2q, 2q + 8 and the next of
//   column g; d: columns 2q and the next of rows g, then g + 8. The lower half of a register is the earlier element.
template <class T>
void mma_16x8x16(Place place, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float (*widen)(T)) {
  uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const Meeting& meeting = meet(place, 0xffffffffu, mine, sizeof(mine));
  const auto element = [&](uint32_t lane, uint32_t index, uint32_t half) {
    uint32_t word;
    memcpy(&word, meeting.payload[lane] + 4 * index, sizeof(word));
    return static_cast<double>(widen(T{static_cast<uint16_t>(word >> 16 * half)}));
  };
  const uint32_t g = lane() / 4, q = lane() % 4;
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t column = 2 * q + i % 2;
    double sum = d[i];
    for (uint32_t k = 0; k < 16; ++k) {
      sum += element(g * 4 + k % 8 / 2, i / 2 + k / 8 * 2, k % 2) * element(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
    }
    d[i] = static_cast<float>(sum);
  }
}

template <class T, class U>
T add(T* address, U value) {
  const T before = *address;
  *address = static_cast<T>(before + value);
  return before;
}

}  // namespace emulator

#define EMULATED_PLACE (::emulator::Place{__FILE__, __LINE__})
#define __syncthreads() ::emulator::sync_block(EMULATED_PLACE)
#define EMULATED_WARP() (void)::emulator::meet(EMULATED_PLACE, 0xffffffffu, nullptr, 0)
#define __syncwarp() EMULATED_WARP()
#define __shfl_sync(...) ::emulator::shuffle_index(EMULATED_PLACE, __VA_ARGS__)
#define __shfl_xor_sync(...) ::emulator::shuffle_xor(EMULATED_PLACE, __VA_ARGS__)
#define __shfl_down_sync(...) ::emulator::shuffle_down(EMULATED_PLACE, __VA_ARGS__)
#define __shfl_up_sync(...) ::emulator::shuffle_up(EMULATED_PLACE, __VA_ARGS__)
#define __ballot_sync(mask, vote) ::emulator::ballot(EMULATED_PLACE, mask, vote)
#define __any_sync(mask, vote) (::emulator::ballot(EMULATED_PLACE, mask, vote) != 0u)
#define __all_sync(mask, vote) (::emulator::ballot(EMULATED_PLACE, mask, !(vote)) == 0u)
#define __reduce_add_sync(mask, x) \
  ::emulator::reduce(EMULATED_PLACE, mask, x, [](auto a, auto b) { return static_cast<decltype(a)>(a + b); })
#define __reduce_max_sync(mask, x) \
  ::emulator::reduce(EMULATED_PLACE, mask, x, [](auto a, auto b) { return a < b ? b : a; })
#define EMULATED_MMA_16X8X16(d, a, b, widen) ::emulator::mma_16x8x16(EMULATED_PLACE, d, a, b, widen)

#define __ldg(address) (*(address))
#define __ldcs(address) (*(address))
#define __stcs(address, value) (*(address) = (value))
#define atomicAdd(address, value) ::emulator::add(address, value)
#define __popc(x) __builtin_popcount(x)
#define __ffs(x) __builtin_ffs(static_cast<int>(x))
#define __float_as_uint(x) ::emulator::bits<uint32_t>(x)
#define __uint_as_float(x) ::emulator::bits<float>(x)

namespace emulator {
template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "the bits of one are the bits of the other");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}
}  // namespace emulator

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}

namespace lockin_fast {
int multiprocessors();
}

#define LOCKIN_FAST_LAUNCH(kernel, grid, block, shared_bytes, stream, params) \
  (static_cast<void>(shared_bytes), static_cast<void>(stream), ::emulator::launch(grid, block, [&] { kernel(params); }))
