// NF4 of whole rows: a block is read once for its scale, and again, from L1, for its codes.
#include "nf4.h"

#include "nf4_decode.h"

namespace lockin_fast {
namespace {

#if LOCKIN_FAST_LEVEL >= 3

// [-1, 1] cut into 31 buckets so narrow that each holds at most one boundary between codes: the bucket's number finds
// the code below and the boundary, and one comparison does the rest.
constexpr int kBuckets = 32;
constexpr float kBucketScale = 15.0f;
constexpr float kRoundsToInteger = 0x1p23f + kBucketScale;  // added, it leaves the bucket's number in the low bits

struct Buckets {
  alignas(64) float boundary[kBuckets];
  alignas(64) int32_t code[kBuckets];
};

constexpr Buckets make_buckets() {
  Buckets buckets = {};
  int code = 0;
  for (int i = 0; i < kBuckets; ++i) {
    buckets.code[i] = code;
    buckets.boundary[i] = __builtin_inff();
    if (code == kNf4Codes - 1) continue;
    const float boundary = nf4_boundary(static_cast<uint32_t>(code));
    const float offset = boundary * kBucketScale + kBucketScale - static_cast<float>(i);  // from the bucket's middle
    if (offset >= -0.5f && offset < 0.5f) {
      buckets.boundary[i] = boundary;
      ++code;
    }
  }
  return buckets;
}

constexpr Buckets kTable = make_buckets();
static_assert(kTable.code[kBuckets - 1] == kNf4Codes - 1, "every boundary has a bucket of its own");

// x = element / absmax, |x| <= 1 up to rounding, never NaN.
LOCKIN_FAST_LOCAL __m512i codes_of(__m512 x) {
  const __m512i bucket = _mm512_castps_si512(
      _mm512_fmadd_ps(x, _mm512_set1_ps(kBucketScale), _mm512_set1_ps(kRoundsToInteger)));
  const __m512 boundary = _mm512_permutex2var_ps(_mm512_load_ps(kTable.boundary), bucket,
                                                 _mm512_load_ps(kTable.boundary + 16));
  const __m512i code = _mm512_permutex2var_epi32(_mm512_load_si512(kTable.code), bucket,
                                                 _mm512_load_si512(kTable.code + 16));
  return _mm512_mask_add_epi32(code, _mm512_cmp_ps_mask(x, boundary, _CMP_GT_OQ), code, _mm512_set1_epi32(1));
}

template <class T>
LOCKIN_FAST_LOCAL void encode_block(const T* x, int64_t n, float inverse, uint8_t* codes) {
  const __m512 scale = _mm512_set1_ps(inverse);
  for (int64_t i = 0; i < n; i += 16) {
    const __m512i code = codes_of(_mm512_mul_ps(load(x + i).v, scale));
    // In each pair of lanes: the even code above the odd one, in the lowest byte.
    const __m512i pairs = _mm512_or_si512(_mm512_slli_epi64(code, 4), _mm512_srli_epi64(code, 32));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + i / 2), _mm512_cvtepi64_epi8(pairs));
  }
}

#else

// One code an element, in the vector type's own lanes: how many boundaries lie below it.
typedef int32_t Codes __attribute__((vector_size(sizeof(Vec))));
constexpr int64_t kVectors = kNf4Step / Vec::width;

struct Boundaries {
  float value[kNf4Codes - 1];
};

constexpr Boundaries make_boundaries() {
  Boundaries boundaries = {};
  for (uint32_t i = 0; i < kNf4Codes - 1; ++i) boundaries.value[i] = nf4_boundary(i);
  return boundaries;
}

constexpr Boundaries kBoundaries = make_boundaries();

LOCKIN_FAST_LOCAL void pack(const Codes* code, uint8_t* codes) {
#if LOCKIN_FAST_LEVEL == 2
  const __m256i mixed = _mm256_packs_epi32(reinterpret_cast<__m256i>(code[0]), reinterpret_cast<__m256i>(code[1]));
  const __m256i pairs = _mm256_madd_epi16(_mm256_permute4x64_epi64(mixed, 0xd8), _mm256_set1_epi32(16 | 1 << 16));
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(codes), _mm_packus_epi16(halves, halves));
#else
  for (int64_t i = 0; i < kNf4Step; i += 2) {
    codes[i / 2] = nf4_pack(code[i / Vec::width][i % Vec::width], code[i / Vec::width][i % Vec::width + 1]);
  }
#endif
}

template <class T>
LOCKIN_FAST_LOCAL void encode_block(const T* x, int64_t n, float inverse, uint8_t* codes) {
  for (int64_t i = 0; i < n; i += kNf4Step) {
    Codes code[kVectors] = {};
    Vec scaled[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) scaled[v] = {load(x + i + v * Vec::width).v * splat(inverse).v};
    for (float boundary : kBoundaries.value) {
      for (int64_t v = 0; v < kVectors; ++v) code[v] -= scaled[v].v > splat(boundary).v;
    }
    pack(code, codes + i / 2);
  }
}

#endif

// For blocks with NaN or Inf, which the buckets do not know.
template <class T>
void encode_any_block(const T* x, int64_t n, float inverse, uint8_t* codes) {
  for (int64_t i = 0; i < n; i += 2) {
    codes[i / 2] = nf4_pack(nf4_code(to_float(x[i]) * inverse), nf4_code(to_float(x[i + 1]) * inverse));
  }
}

// Magnitudes are compared as integers, in the width that they are stored in.
template <class T>
LOCKIN_FAST_LOCAL float largest_magnitude(const T* x, int64_t n) {
  T result = {0};
#if LOCKIN_FAST_LEVEL >= 2
  __m256i largest = _mm256_setzero_si256();
  for (int64_t i = 0; i < n; i += kNf4Step) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    largest = _mm256_max_epu16(largest, _mm256_and_si256(bits, _mm256_set1_epi16(0x7fff)));
  }
  const __m128i half = _mm_max_epu16(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
  const __m128i all = _mm_set1_epi16(-1);  // the largest is the least of the complements, which one instruction finds
  result.bits = static_cast<uint16_t>(~_mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(half, all)), 0));
#else
  for (int64_t i = 0; i < n; ++i) {
    const uint16_t bits = x[i].bits & 0x7fffu;
    result.bits = bits > result.bits ? bits : result.bits;
  }
#endif
  return to_float(result);
}

LOCKIN_FAST_LOCAL float largest_magnitude(const float* x, int64_t n) {
  uint32_t result = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = magnitude_bits(x[i]);
    result = bits > result ? bits : result;
  }
  return float_from_bits(result);
}

// `scratch` holds a block, for those with outlier channels in them.
template <class T>
void quantize(const Nf4QuantizeArgs& args, int64_t begin, int64_t end, T* scratch) {
  for (int64_t t = begin; t < end; ++t) {
    const T* row = static_cast<const T*>(args.h) + t * args.h_stride;
    uint8_t* codes = args.codes + t * (args.width / 2);
    float* absmax = args.absmax + t * (args.width / args.blocksize);
    T* outliers = static_cast<T*>(args.outliers) + t * args.channel_count;
    int64_t channel = 0;
    for (int64_t i = 0; i < args.width; i += args.blocksize, ++absmax) {
      const T* block = row + i;
      for (; channel < args.channel_count && args.channels[channel] < i + args.blocksize; ++channel) {
        if (block != scratch) memcpy(scratch, block, static_cast<size_t>(args.blocksize) * sizeof(T));
        block = scratch;
        outliers[channel] = row[args.channels[channel]];
        scratch[args.channels[channel] - i] = T{};
      }
      *absmax = largest_magnitude(block, args.blocksize);
      const float inverse = nf4_inverse(*absmax);
      if (*absmax < __builtin_inff()) {
        encode_block(block, args.blocksize, inverse, codes + i / 2);
      } else {
        encode_any_block(block, args.blocksize, inverse, codes + i / 2);
      }
    }
  }
}

// Past what caches keep, storing around them saves reading every line of the result before it is written.
constexpr int64_t kStreamBytes = int64_t{8} << 20;
constexpr int64_t kLine = 64;

template <class T>
bool streams(const Nf4Rows& rows, const T* out, int64_t tokens) {
  const int64_t line = kLine / static_cast<int64_t>(sizeof(T));
  return LOCKIN_FAST_LEVEL >= 3 && rows.channel_count == 0 && rows.blocksize % line == 0 &&
         reinterpret_cast<uintptr_t>(out) % kLine == 0 && tokens * rows.width * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
}

template <class T>
void dequantize(const Nf4Rows& rows, T* out, int64_t begin, int64_t end) {
  if (streams(rows, out, end - begin)) {
    for (int64_t t = begin; t < end; ++t) decode_codes<true>(rows, t, out + t * rows.width);
#if LOCKIN_FAST_LEVEL >= 3
    _mm_sfence();
#endif
  } else {
    for (int64_t t = begin; t < end; ++t) decode_row(rows, t, out + t * rows.width);
  }
}

}  // namespace

namespace LOCKIN_FAST_UNIT {

void nf4_quantize(const Nf4QuantizeArgs& args, int64_t begin, int64_t end, void* block) {
  switch (args.dtype) {
    case Dtype::f32: return quantize(args, begin, end, static_cast<float*>(block));
    case Dtype::f16: return quantize(args, begin, end, static_cast<f16*>(block));
    case Dtype::bf16: return quantize(args, begin, end, static_cast<bf16*>(block));
  }
}

void nf4_dequantize(const Nf4Rows& rows, Dtype dtype, void* out, int64_t begin, int64_t end) {
  switch (dtype) {
    case Dtype::f32: return dequantize(rows, static_cast<float*>(out), begin, end);
    case Dtype::f16: return dequantize(rows, static_cast<f16*>(out), begin, end);
    case Dtype::bf16: return dequantize(rows, static_cast<bf16*>(out), begin, end);
  }
}

}  // namespace LOCKIN_FAST_UNIT
}  // namespace lockin_fast
