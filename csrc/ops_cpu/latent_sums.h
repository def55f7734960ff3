// The kernel of latent_stats and segment_stats, run on arguments and accumulators that are made.
#pragma once

#include "../cpu/latent_stats.h"

#include "wide.h"

namespace lockin_fast {

inline void add_latent_sums(const Wide& wide, int64_t latents, Tensor& sum, Tensor& sum_squares, Tensor& count,
                            Tensor& count_ref) {
  const LatentStatsArgs args{wide.args, static_cast<double*>(sum.mutable_data_ptr()),
                             static_cast<double*>(sum_squares.mutable_data_ptr()),
                             static_cast<int64_t*>(count.mutable_data_ptr()),
                             static_cast<int64_t*>(count_ref.mutable_data_ptr())};
  static const auto kernel = LOCKIN_FAST_CHOOSE(latent_stats);
  torch::stable::parallel_for(0, wide_units(latents), 1, [&](int64_t first, int64_t last) {
    const Room packed(wide.lot_bytes);
    kernel(args, first * kWideUnit, std::min(last * kWideUnit, latents), packed.data);
  });
}

}  // namespace lockin_fast
