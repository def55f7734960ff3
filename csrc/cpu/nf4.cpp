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

template <class T>
LOCKIN_FAST_LOCAL void encode_block(const T* x, int64_t n, float inverse, uint8_t* codes) {
  for (int64_t i = 0; i < n; i += kNf4Step) {
    float values[kNf4Step];
    int32_t code[kNf4Step] = {};
    for (int64_t j = 0; j < kNf4Step; j += Vec::width) store(values + j, load(x + i + j));
    for (int64_t j = 0; j < kNf4Step; ++j) values[j] *= inverse;
    for (uint32_t b = 0; b < kNf4Codes - 1; ++b) {
      for (int64_t j = 0; j < kNf4Step; ++j) code[j] += !(values[j] <= nf4_boundary(b));
    }
    for (int64_t j = 0; j < kNf4Step; j += 2) codes[(i + j) / 2] = nf4_pack(code[j], code[j + 1]);
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
  uint16_t largest[kNf4Step] = {};
  for (int64_t i = 0; i < n; i += kNf4Step) {
    for (int64_t j = 0; j < kNf4Step; ++j) {
      const uint16_t bits = x[i + j].bits & 0x7fffu;
      largest[j] = bits > largest[j] ? bits : largest[j];
    }
  }
  T result = {0};
  for (uint16_t bits : largest) result.bits = bits > result.bits ? bits : result.bits;
  return to_float(result);
}

LOCKIN_FAST_LOCAL float largest_magnitude(const float* x, int64_t n) {
  uint32_t largest[kNf4Step] = {};
  for (int64_t i = 0; i < n; i += kNf4Step) {
    for (int64_t j = 0; j < kNf4Step; ++j) {
      const uint32_t bits = magnitude_bits(x[i + j]);
      largest[j] = bits > largest[j] ? bits : largest[j];
    }
  }
  uint32_t result = 0;
  for (uint32_t bits : largest) result = bits > result ? bits : result;
  return float_from_bits(result);
}

template <class T>
void quantize(const Nf4QuantizeArgs& args, int64_t begin, int64_t end, T* scratch) {
  for (int64_t t = begin; t < end; ++t) {
    const T* row = static_cast<const T*>(args.h) + t * args.h_stride;
    uint8_t* codes = args.codes + t * (args.width / 2);
    float* absmax = args.absmax + t * (args.width / args.blocksize);
    if (args.channel_count) {
      T* outliers = static_cast<T*>(args.outliers) + t * args.channel_count;
      for (int64_t j = 0; j < args.channel_count; ++j) outliers[j] = row[args.channels[j]];
      memcpy(scratch, row, static_cast<size_t>(args.width) * sizeof(T));
      for (int64_t j = 0; j < args.channel_count; ++j) scratch[args.channels[j]] = T{};
      row = scratch;
    }
    for (int64_t i = 0; i < args.width; i += args.blocksize, ++absmax) {
      *absmax = largest_magnitude(row + i, args.blocksize);
      const float inverse = nf4_inverse(*absmax);
      if (*absmax < __builtin_inff()) {
        encode_block(row + i, args.blocksize, inverse, codes + i / 2);
      } else {
        encode_any_block(row + i, args.blocksize, inverse, codes + i / 2);
      }
    }
  }
}

template <class T>
void dequantize(const Nf4Rows& rows, T* out, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) decode_row(rows, t, out + t * rows.width);
}

}  // namespace

namespace LOCKIN_FAST_UNIT {

void nf4_quantize(const Nf4QuantizeArgs& args, int64_t begin, int64_t end, void* row) {
  switch (args.dtype) {
    case Dtype::f32: return quantize(args, begin, end, static_cast<float*>(row));
    case Dtype::f16: return quantize(args, begin, end, static_cast<f16*>(row));
    case Dtype::bf16: return quantize(args, begin, end, static_cast<bf16*>(row));
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
