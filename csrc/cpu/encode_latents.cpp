// z = activation(h W^T + b) for K latents.
#include "encode_latents.h"

#include "dot.h"

#include "../common/penalty.h"

namespace lockin_fast {
namespace {

template <class T>
void encode(const EncodeArgs& args, int64_t begin, int64_t end) {
  int64_t tokens[kRows], following[kRows];
  int64_t token = begin;
  int count = next_tokens(nullptr, &token, end, tokens);
  while (count > 0) {
    const int next_count = next_tokens(nullptr, &token, end, following);
    float* out[kRows];
    for (int r = 0; r < count; ++r) out[r] = args.out + tokens[r] * args.latents;
    row_products(args, rows_of<T>(args.h, args.h_stride, tokens, count),
                 rows_of<T>(args.h, args.h_stride, following, next_count), out);
    for (int r = 0; r < count; ++r) {
      for (int64_t k = 0; k < args.latents; ++k) {
        const float threshold = args.threshold ? args.threshold[k] : -__builtin_inff();
        out[r][k] = activation(out[r][k] + args.bias[k], threshold);
      }
    }
    count = next_count;
    for (int r = 0; r < count; ++r) tokens[r] = following[r];
  }
}

}  // namespace

namespace LOCKIN_FAST_UNIT {

int64_t pack_units(const EncodeArgs& args) { return (args.latents + kColumns - 1) / kColumns; }

void pack(const EncodeArgs& args, int64_t first, int64_t last) {
  switch (args.dtype) {
    case Dtype::f32: return pack_groups(args, static_cast<float*>(args.packed), first, last);
    case Dtype::f16: return pack_groups(args, static_cast<f16*>(args.packed), first, last);
    case Dtype::bf16: return pack_groups(args, static_cast<bf16*>(args.packed), first, last);
  }
}

void encode_latents(const EncodeArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case Dtype::f32: return encode<float>(args, begin, end);
    case Dtype::f16: return encode<f16>(args, begin, end);
    case Dtype::bf16: return encode<bf16>(args, begin, end);
  }
}

}  // namespace LOCKIN_FAST_UNIT
}  // namespace lockin_fast
