// Products of all tokens with the latents of a whole SAE, in an order that keeps both operands in the caches.
//
// From the outside in: a lot of latents, packed once (third-level cache); a chunk of tokens (third level); a block of
// the lot (second level); a register tile of tokens. Tokens come from memory once a lot, whatever their number.
#pragma once

#include "dot.h"
#include "wide.h"

#include "../common/penalty.h"

namespace lockin_fast {
namespace {

constexpr int64_t kBlock = (kGroups * kColumns + 15) / 16 * 16;  // latents at most, in whole vectors
constexpr int64_t kBlockBytes = 384 << 10;
constexpr int64_t kTokenBytes = int64_t{4} << 20;
constexpr int kChunkTokens = 512;
constexpr int64_t kResidentBytes = 2048;  // of a row: what is multiplied by a whole block from the first-level cache

// Latents of a block, whole column groups.
template <class T>
int64_t block_latents(int64_t width) {
  const int64_t group = kColumns * padded_width(width) * static_cast<int64_t>(sizeof(T));
  const int64_t groups = group > 0 ? kBlockBytes / group : kGroups;
  return kColumns * (groups < 1 ? 1 : groups < kGroups ? groups : kGroups);
}

template <class T>
Rows<T> tile(const void* data, int64_t stride, const int64_t* tokens, int count, int first) {
  return rows_of<T>(data, stride, tokens + first, count - first < kRows ? count - first : kRows);
}

// Pre-activations, without bias, of a tile of tokens; zeros or leftovers beyond the block's latents.
struct Tile {
  alignas(64) float pre[kRows][kBlock], pre_ref[kRows][kBlock];
};

// What turns the pre-activations of a block into latents; zeros beyond the block's latents.
struct Gates {
  alignas(64) float bias[kBlock] = {}, threshold[kBlock] = {};

  void load(const EncodeArgs& encode, int64_t k0, int64_t latents) {
    for (int64_t k = 0; k < latents; ++k) {
      bias[k] = encode.bias[k0 + k];
      threshold[k] = encode.threshold ? encode.threshold[k0 + k] : -__builtin_inff();
    }
  }

  LOCKIN_FAST_LOCAL float latent(float pre, int64_t k) const { return activation(pre + bias[k], threshold[k]); }
};

// How many of the tokens that the mask keeps are taken at a time.
template <class T>
int chunk_tokens(const WideArgs& args) {
  const int64_t bytes = (args.h_ref ? 2 : 1) * (args.encode.width + 1) * static_cast<int64_t>(sizeof(T));
  const int64_t fitting = kTokenBytes / bytes;
  return fitting < kRows ? kRows : fitting < kChunkTokens ? static_cast<int>(fitting) : kChunkTokens;
}

// One block of latents, packed, against a chunk of tokens. Meanwhile `block_bytes` of packed latents behind it, the
// next block, come from the third level; none if that is 0.
template <class T, class Use>
LOCKIN_FAST_LOCAL void block_products(const WideArgs& args, const EncodeArgs& block, int64_t block_bytes,
                                      const int64_t* tokens, int count, Tile* results, Use& use) {
  float *out[kRows], *out_ref[kRows];
  for (int r = 0; r < kRows; ++r) {
    out[r] = results->pre[r];
    out_ref[r] = results->pre_ref[r];
  }
  const int64_t share = (block_bytes * kRows / count + kLineBytes - 1) / kLineBytes * kLineBytes;
  const char* behind = static_cast<const char*>(block.packed) + block_bytes;
  for (int i = 0; i < count; i += kRows, behind += share) {
    const int following = i + kRows < count ? i + kRows : 0;  // the next block starts over
    const Rows<T> here = tile<T>(block.h, block.h_stride, tokens, count, i);
    const Rows<T> next = tile<T>(block.h, block.h_stride, tokens, count, following);
    if (args.h_ref) {
      const Rows<T> other = tile<T>(args.h_ref, args.h_ref_stride, tokens, count, i);
      row_products(block, here, other, out, kResidentBytes);
      row_products(block, other, next, out_ref, kResidentBytes);
    } else {
      row_products(block, here, next, out, kResidentBytes);
    }
    prefetch(behind, share);
    use.tile(*results, tokens + i, here.count);
  }
}

// For every block of the latents [begin, end) and every chunk of the tokens that the mask keeps:
// use.begin(k0, latents, segment), use.tile(results, tokens, count) for a few of the chunk's tokens after others,
// use.end(). A chunk is of one segment. A token meets its latents in ascending order. packed has room for a lot of
// padded rows.
template <class T, class Use>
void wide_products(const WideArgs& args, int64_t begin, int64_t end, void* packed, Use& use) {
  const int64_t width = args.encode.width, lot = wide_lot(width, sizeof(T)), step = block_latents<T>(width);
  const int chunk = chunk_tokens<T>(args);
  Tile results = {};
  int64_t tokens[kChunkTokens];
  for (int64_t k_lot = begin; k_lot < end; k_lot += lot) {
    EncodeArgs rows = args.encode;
    rows.latents = end - k_lot < lot ? end - k_lot : lot;
    rows.weight = static_cast<const T*>(rows.weight) + k_lot * rows.weight_stride;
    pack_groups(rows, static_cast<T*>(packed), 0, (rows.latents + kColumns - 1) / kColumns);
    int64_t segment = 0;
    for (int64_t token = 0; token < args.tokens;) {
      while (args.ends && args.ends[segment] <= token) ++segment;
      const int64_t stop = args.ends ? args.ends[segment] : args.tokens;
      int count = 0;
      for (; token < stop && count < chunk; ++token) {
        if (!args.mask || args.mask[token]) tokens[count++] = token;
      }
      for (int64_t k0 = 0; k0 < rows.latents && count > 0; k0 += step) {
        EncodeArgs block = rows;
        block.latents = rows.latents - k0 < step ? rows.latents - k0 : step;
        block.packed = static_cast<T*>(packed) + k0 * padded_width(width);
        const bool last = k0 + step >= rows.latents;
        const int64_t bytes = last ? 0 : step * padded_width(width) * static_cast<int64_t>(sizeof(T));
        use.begin(k_lot + k0, block.latents, segment);
        block_products<T>(args, block, bytes, tokens, count, &results, use);
        use.end();
      }
    }
  }
}

}  // namespace
}  // namespace lockin_fast
