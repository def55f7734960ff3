// Sums over tokens of every latent of a whole SAE, of one stream or of the difference of two.
//
// A thread owns blocks of latents and runs all tokens past each, so a sum never depends on the number of threads, no
// thread waits for another, and only a few tokens' latents exist at any time.
#include "latent_stats.h"

#include "dot.h"

#include "../common/penalty.h"

namespace lockin_fast {
namespace {

constexpr int64_t kBlock = kGroups * kColumns;
static_assert(kBlock <= kStatsBlock, "the caller sizes the packed block by kStatsBlock");

struct Sums {
  double sum[kBlock], squares[kBlock];
  int64_t count[kBlock], count_ref[kBlock];
};

LOCKIN_FAST_LOCAL void add_token(const EncodeArgs& block, const float* pre, const float* pre_ref, Sums* sums) {
  for (int64_t k = 0; k < block.latents; ++k) {
    const float threshold = block.threshold ? block.threshold[k] : -__builtin_inff();
    const float z = activation(pre[k] + block.bias[k], threshold);
    const float z_ref = pre_ref ? activation(pre_ref[k] + block.bias[k], threshold) : 0.0f;
    const double value = static_cast<double>(z - z_ref);
    sums->sum[k] += value;
    sums->squares[k] += value * value;
    sums->count[k] += z > 0.0f;
    sums->count_ref[k] += z_ref > 0.0f;
  }
}

template <class T>
void block_stats(const LatentStatsArgs& args, const EncodeArgs& block, Sums* sums) {
  float pre[kRows][kBlock], pre_ref[kRows][kBlock];
  float *out[kRows], *out_ref[kRows];
  for (int r = 0; r < kRows; ++r) {
    out[r] = pre[r];
    out_ref[r] = pre_ref[r];
  }
  int64_t tokens[kRows], following[kRows];
  int64_t token = 0;
  int count = next_tokens(args.mask, &token, args.tokens, tokens);
  while (count > 0) {
    const int next_count = next_tokens(args.mask, &token, args.tokens, following);
    const Rows<T> rows = rows_of<T>(block.h, block.h_stride, tokens, count);
    const Rows<T> next = rows_of<T>(block.h, block.h_stride, following, next_count);
    if (args.h_ref) {
      const Rows<T> rows_ref = rows_of<T>(args.h_ref, args.h_ref_stride, tokens, count);
      row_products(block, rows, rows_ref, out);
      row_products(block, rows_ref, next, out_ref);
    } else {
      row_products(block, rows, next, out);
    }
    for (int r = 0; r < count; ++r) add_token(block, pre[r], args.h_ref ? pre_ref[r] : nullptr, sums);
    count = next_count;
    memcpy(tokens, following, sizeof(tokens));
  }
}

template <class T>
void stats(const LatentStatsArgs& args, int64_t first, int64_t last, void* packed) {
  for (int64_t k0 = first * kBlock; k0 < last * kBlock && k0 < args.encode.latents; k0 += kBlock) {
    EncodeArgs block = args.encode;
    block.latents = args.encode.latents - k0 < kBlock ? args.encode.latents - k0 : kBlock;
    block.weight = static_cast<const T*>(args.encode.weight) + k0 * args.encode.weight_stride;
    block.bias += k0;
    if (block.threshold) block.threshold += k0;
    block.packed = packed;
    pack_groups(block, static_cast<T*>(packed), 0, kGroups);
    Sums sums = {};
    block_stats<T>(args, block, &sums);
    const size_t n = static_cast<size_t>(block.latents) * sizeof(double);
    memcpy(args.sum + k0, sums.sum, n);
    memcpy(args.sum_squares + k0, sums.squares, n);
    memcpy(args.count + k0, sums.count, n);
    if (args.count_ref) memcpy(args.count_ref + k0, sums.count_ref, n);
  }
}

}  // namespace

namespace LOCKIN_FAST_UNIT {

int64_t stats_blocks(const LatentStatsArgs& args) { return (args.encode.latents + kBlock - 1) / kBlock; }

void latent_stats(const LatentStatsArgs& args, int64_t first, int64_t last, void* packed) {
  switch (args.encode.dtype) {
    case Dtype::f32: return stats<float>(args, first, last, packed);
    case Dtype::f16: return stats<f16>(args, first, last, packed);
    case Dtype::bf16: return stats<bf16>(args, first, last, packed);
  }
}

}  // namespace LOCKIN_FAST_UNIT
}  // namespace lockin_fast
