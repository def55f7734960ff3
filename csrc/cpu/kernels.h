// What the op wrappers hand to the kernels: plain pointers and sizes, checked and allocated by the caller.
//
// Strides are in elements. A kernel works on tokens [begin, end), so the caller decides how tokens are shared out; a
// token's result never depends on that choice.
#pragma once

#include <cstdint>

namespace lockin_fast {

enum class Dtype { f32, f16, bf16 };

struct EncodeArgs {
  Dtype dtype;             // of h, h_ref and weight
  const void* h;           // [T, d]
  int64_t h_stride;
  const void* weight;      // [K, d]
  int64_t weight_stride;
  const float* bias;       // [K]
  const float* threshold;  // [K] or null
  int64_t latents;         // K
  int64_t width;           // d
  void* packed;            // [K, padded d] room for the packed weight, of dtype
  float* out;              // [T, K] latents; block_penalty writes its coefficients here
};

struct BlockPenaltyArgs {
  EncodeArgs encode;
  const void* h_ref;       // [T, d] or null
  int64_t h_ref_stride;
  const float* z_ref;      // [T, K] or null
  const bool* mask;        // [T] or null
  const float* sign;       // [K]
  const float* margin;     // [K] or null
  float unit;              // 1 for the sum over latents, 1/K for the mean
  float* per_token;        // [T]
};

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
  float* panels;             // [K, padded d] room for the packed weight, in fp32
  int64_t latents;
  int64_t width;
};

struct LatentStatsArgs {
  EncodeArgs encode;  // out and packed are not used
  const void* h_ref;  // [T, d] or null
  int64_t h_ref_stride;
  const bool* mask;   // [T] or null
  int64_t tokens;     // T
  double* sum;        // [F], of z or z - z_ref
  double* sum_squares;
  int64_t* count;
  int64_t* count_ref;  // [F] or null
};

// Latents of a block of latent_stats, at most.
constexpr int64_t kStatsBlock = 40;

// Tokens a kernel takes at a time; the caller's grain is a multiple of it.
constexpr int64_t kTokenTile = 32;
constexpr int64_t kPenaltyScratch = 5;

// A packed weight has its width rounded up to this.
constexpr int64_t kWidthPadding = 256;

struct Kernels {
  // First the packing, once a call: every token reads the weight again and again.
  int64_t (*pack_units)(const EncodeArgs&);
  void (*pack)(const EncodeArgs&, int64_t first, int64_t last);
  void (*encode_latents)(const EncodeArgs&, int64_t begin, int64_t end);
  // Returns the number of active pairs; scratch holds kPenaltyScratch * K floats.
  int64_t (*block_penalty)(const BlockPenaltyArgs&, int64_t begin, int64_t end, float* scratch);
  int64_t (*pack_panel_units)(const LatentBackwardArgs&);
  void (*pack_panels)(const LatentBackwardArgs&, int64_t first, int64_t last);
  // values and indices hold 2 * kTokenTile * K elements each.
  void (*latent_backward)(const LatentBackwardArgs&, int64_t begin, int64_t end, float* values, int32_t* indices);
  int64_t (*stats_blocks)(const LatentStatsArgs&);
  // packed has room for kStatsBlock padded rows, of dtype.
  void (*latent_stats)(const LatentStatsArgs&, int64_t first, int64_t last, void* packed);
};

}  // namespace lockin_fast
