// The gradient of the narrow ops to the hidden state.
#pragma once

#include "kernels.h"

namespace lockin_fast {

struct LatentBackwardArgs {
  Dtype dtype;               // of grad and out
  const void* grad;          // [T, d] or null; may be out itself
  int64_t grad_stride;
  void* out;                 // [T, d]
  int64_t out_stride;
  const float* coefficient;  // [T, K]
  const float* scale;        // [T]
  const void* weight;        // [K, d]
  int64_t weight_stride;
  void* panels;              // [K, padded d] room for the packed weight, of dtype
  int64_t latents;
  int64_t width;
};

// Room for the factors of a tile of tokens, with what a vector may write past them.
constexpr int64_t factor_room(int64_t latents) { return kTokenTile * latents + 16; }

LOCKIN_FAST_DECLARE(int64_t, pack_panel_units, const LatentBackwardArgs&)
LOCKIN_FAST_DECLARE(void, pack_panels, const LatentBackwardArgs&, int64_t first, int64_t last)
// values and indices hold 2 * factor_room(K) elements each.
LOCKIN_FAST_DECLARE(void, latent_backward, const LatentBackwardArgs&, int64_t begin, int64_t end, float* values,
                    int32_t* indices)

}  // namespace lockin_fast
