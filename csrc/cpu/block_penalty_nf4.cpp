// A few rows of the reference are decoded to h's dtype, and go through block_penalty as a dense h_ref would: equal bit
// for bit to that on a dequantised copy, which never exists. While a row is decoded, that of h is fetched.
#include "block_penalty_nf4.h"

#include "nf4_decode.h"

namespace lockin_fast {
namespace {

constexpr int64_t kLineBytes = 64;

template <class T>
void decode_tokens(const BlockPenaltyArgs& args, const Nf4Rows& reference, int64_t begin, int64_t end, T* decoded) {
  const int64_t width = reference.width;
  for (int64_t t = begin; t < end; ++t, decoded += width) {
    if (args.mask && !args.mask[t]) continue;
    const char* row = static_cast<const char*>(args.encode.h) + t * args.encode.h_stride * static_cast<int64_t>(sizeof(T));
    for (int64_t i = 0; i < width * static_cast<int64_t>(sizeof(T)); i += kLineBytes) __builtin_prefetch(row + i, 0, 2);
    decode_row(reference, t, decoded);
  }
}

// The same problem, with token `begin` as its first.
template <class T>
BlockPenaltyArgs from_token(const BlockPenaltyArgs& args, int64_t begin, const T* decoded) {
  BlockPenaltyArgs moved = args;
  moved.encode.h = static_cast<const T*>(args.encode.h) + begin * args.encode.h_stride;
  moved.encode.out = args.encode.out + begin * args.encode.latents;
  moved.per_token = args.per_token + begin;
  if (args.mask) moved.mask = args.mask + begin;
  moved.h_ref = decoded;
  moved.h_ref_stride = args.encode.width;
  return moved;
}

template <class T>
int64_t penalty(const BlockPenaltyArgs& args, const Nf4Rows& reference, int64_t begin, int64_t end, T* decoded,
                float* scratch) {
  int64_t active = 0;
  for (; begin < end; begin += kNf4Tokens) {
    const int64_t count = end - begin < kNf4Tokens ? end - begin : kNf4Tokens;
    decode_tokens(args, reference, begin, begin + count, decoded);
    active += LOCKIN_FAST_UNIT::block_penalty(from_token(args, begin, decoded), 0, count, scratch);
  }
  return active;
}

}  // namespace

namespace LOCKIN_FAST_UNIT {

int64_t block_penalty_nf4(const BlockPenaltyArgs& args, const Nf4Rows& reference, int64_t begin, int64_t end,
                          void* decoded, float* scratch) {
  switch (args.encode.dtype) {
    case Dtype::f32: return penalty(args, reference, begin, end, static_cast<float*>(decoded), scratch);
    case Dtype::f16: return penalty(args, reference, begin, end, static_cast<f16*>(decoded), scratch);
    case Dtype::bf16: return penalty(args, reference, begin, end, static_cast<bf16*>(decoded), scratch);
  }
  return 0;
}

}  // namespace LOCKIN_FAST_UNIT
}  // namespace lockin_fast
