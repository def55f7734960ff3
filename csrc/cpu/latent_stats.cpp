// Sums over tokens of every latent of a whole SAE, of one stream or of the difference of two.
//
// A thread owns some latents and runs all tokens past them, so a sum never depends on the number of threads, no thread
// waits for another, and only a few tokens' latents exist at any time.
#include "latent_stats.h"

#include "wide_product.h"

namespace lockin_fast {
namespace {

// The sums of one block over the tokens of a chunk, kept where nothing else can be written meanwhile.
class BlockSums {
 public:
  explicit BlockSums(const LatentStatsArgs& args) : args_(args), sum_() {}

  void begin(int64_t k0, int64_t latents, int64_t segment) {
    k0_ = k0;
    latents_ = latents;
    segment_sum_ = args_.sum + segment * args_.wide.encode.latents + k0;
    gates_.load(args_.wide.encode, k0, latents);
    for (int64_t k = 0; k < latents; ++k) {
      sum_[k] = segment_sum_[k];
      squares_[k] = args_.sum_squares[k0 + k];
    }
    memset(count_, 0, sizeof(count_));
    memset(count_ref_, 0, sizeof(count_ref_));
  }

  void tile(const Tile& tile, const int64_t*, int count) {
    if (count == kRows) return add<kRows>(tile.pre, tile.pre_ref);
    for (int r = 0; r < count; ++r) add<1>(tile.pre + r, tile.pre_ref + r);
  }

  void end() {
    for (int64_t k = 0; k < latents_; ++k) {
      segment_sum_[k] = sum_[k];
      args_.sum_squares[k0_ + k] = squares_[k];
      args_.count[k0_ + k] += count_[k];
      if (args_.wide.h_ref) args_.count_ref[k0_ + k] += count_ref_[k];
    }
  }

 private:
  template <int R>
  LOCKIN_FAST_LOCAL void add(const float (*pre)[kBlock], const float (*pre_ref)[kBlock]) {
    return args_.wide.h_ref ? add<R, true>(pre, pre_ref) : add<R, false>(pre, pre_ref);
  }

  template <int R, bool difference>
  LOCKIN_FAST_LOCAL void add(const float (*pre)[kBlock], const float (*pre_ref)[kBlock]) {
    for (int64_t k = 0; k < kBlock; ++k) {
      for (int r = 0; r < R; ++r) {
        const float z = gates_.latent(pre[r][k], k);
        const float z_ref = difference ? gates_.latent(pre_ref[r][k], k) : 0.0f;
        const double value = static_cast<double>(z - z_ref);
        sum_[k] += value;
        squares_[k] += value * value;
        count_[k] += z > 0.0f;
        if (difference) count_ref_[k] += z_ref > 0.0f;
      }
    }
  }

  const LatentStatsArgs& args_;
  int64_t k0_, latents_;
  double* segment_sum_;
  Gates gates_;
  alignas(64) double sum_[kBlock], squares_[kBlock];
  alignas(64) int32_t count_[kBlock], count_ref_[kBlock];
};

template <class T>
void stats(const LatentStatsArgs& args, int64_t begin, int64_t end, void* packed) {
  BlockSums sums(args);
  wide_products<T>(args.wide, begin, end, packed, sums);
}

}  // namespace

namespace LOCKIN_FAST_UNIT {

void latent_stats(const LatentStatsArgs& args, int64_t begin, int64_t end, void* packed) {
  switch (args.wide.encode.dtype) {
    case Dtype::f32: return stats<float>(args, begin, end, packed);
    case Dtype::f16: return stats<f16>(args, begin, end, packed);
    case Dtype::bf16: return stats<bf16>(args, begin, end, packed);
  }
}

}  // namespace LOCKIN_FAST_UNIT
}  // namespace lockin_fast
