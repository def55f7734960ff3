// Attention mass on the induction stripe: a vector lane is a query, so that nothing is ever summed across lanes.
//
// The queries are packed once, transposed. A register tile then multiplies a few keys, broadcast element by element, by
// kVecs vectors of queries; the logits of a tile of keys stay in L1, where the online softmax takes them, and with them
// the mass on keys whose preceding token is the query's.
#include "prefix_matching.h"

#include <cmath>

#include "exp_log.h"

namespace lockin_fast {
namespace {

#if LOCKIN_FAST_LEVEL >= 3
constexpr int kKeys = 6, kVecs = 4;  // 24 accumulators of 32 registers
#elif LOCKIN_FAST_LEVEL == 2
constexpr int kKeys = 4, kVecs = 3;  // 12 of 16
#else
constexpr int kKeys = 4, kVecs = 2;  // 8 of 16
#endif
constexpr int64_t kQueries = kVecs * Vec::width;
constexpr int64_t kTileKeys = 48;
static_assert(kTileKeys % kKeys == 0, "a tile is a whole number of register tiles");

// What the products multiply: fp32, except where the processor multiplies pairs of bf16.
template <class T>
struct Product {
  using Element = float;
  using Operand = Vec;
  static constexpr int64_t step = 1;  // elements of the width that one multiply-accumulate consumes
  static LOCKIN_FAST_LOCAL Vec read(const float* p) { return load(p); }
  static LOCKIN_FAST_LOCAL Vec repeat(const float* p) { return splat(*p); }
  static LOCKIN_FAST_LOCAL Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
};

#if LOCKIN_FAST_LEVEL == 4
template <>
struct Product<bf16> {
  using Element = bf16;
  using Operand = DotOperand<bf16>;
  static constexpr int64_t step = 2;
  static LOCKIN_FAST_LOCAL Operand read(const bf16* p) { return Operand::read(p); }
  static LOCKIN_FAST_LOCAL Operand repeat(const bf16* p) {
    int32_t pair;
    memcpy(&pair, p, sizeof(pair));
    return {reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair))};
  }
  static LOCKIN_FAST_LOCAL Vec multiply_add(Operand a, Operand b, Vec c) { return lockin_fast::multiply_add(a, b, c); }
};
#endif

constexpr int64_t padded_to_step(int64_t width) { return (width + 1) / 2 * 2; }

LOCKIN_FAST_LOCAL void convert(bf16 x, bf16* out) { *out = x; }
template <class T>
LOCKIN_FAST_LOCAL void convert(T x, float* out) {
  *out = to_float(x);
}

// Where each lane's query stands and what it looks for.
struct Lanes {
  Ints position[kVecs], token[kVecs];
};

struct Softmax {
  Vec largest, sum, mass;
};

// Step by step along the width, the lanes' elements side by side; zeros past the width and in lanes without a query.
template <class T, class Element>
void pack_queries(const PrefixMatchingArgs& args, const int32_t* queries, int64_t count, Element* packed) {
  constexpr int64_t step = Product<T>::step;
  memset(packed, 0, static_cast<size_t>(kQueries * padded_to_step(args.width)) * sizeof(Element));
  for (int64_t lane = 0; lane < count; ++lane) {
    const T* row = static_cast<const T*>(args.q) + queries[lane] * args.q_stride;
    for (int64_t i = 0; i < args.width; ++i) convert(row[i], packed + (i / step * kQueries + lane) * step + i % step);
  }
}

Lanes lanes_of(const PrefixMatchingArgs& args, const int32_t* queries, int64_t count) {
  int32_t position[kQueries], token[kQueries];
  for (int64_t lane = 0; lane < kQueries; ++lane) {
    position[lane] = lane < count ? queries[lane] : -1;
    token[lane] = lane < count ? args.tokens[queries[lane]] : -1;
  }
  Lanes lanes;
  memcpy(lanes.position, position, sizeof(position));
  memcpy(lanes.token, token, sizeof(token));
  return lanes;
}

// The keys of a tile as the products want them: in place, or in `converted`.
template <class Element>
struct Keys {
  const Element* rows;
  int64_t stride;
};

LOCKIN_FAST_LOCAL Keys<float> keys_of(const PrefixMatchingArgs& args, const float* first, int64_t, float*) {
  return {first, args.k_stride};
}

template <class T, class Element>
LOCKIN_FAST_LOCAL Keys<Element> keys_of(const PrefixMatchingArgs& args, const T* first, int64_t count,
                                        Element* converted) {
  const int64_t stride = padded_to_step(args.width);
  for (int64_t key = 0; key < count; ++key) {
    const T* row = first + key * args.k_stride;
    Element* out = converted + key * stride;
    int64_t i = 0;
    for (; i + Vec::width <= args.width; i += Vec::width) store(out + i, load(row + i));
    if (i < args.width) store_first(out + i, load_first(row + i, args.width - i), args.width - i);
    for (i = args.width; i < stride; ++i) convert(T{}, out + i);
  }
  return {converted, stride};
}

// logits[key][lane] = scale * keys[key] . queries[lane], for the first N keys.
template <int N, class T, class Element>
LOCKIN_FAST_LOCAL void multiply(const PrefixMatchingArgs& args, const Keys<Element>& keys, const Element* packed,
                                float* logits) {
  using P = Product<T>;
  Vec acc[N][kVecs];
  for (int r = 0; r < N; ++r) {
    for (int c = 0; c < kVecs; ++c) acc[r][c] = zeros();
  }
  for (int64_t i = 0; i < args.width; i += P::step, packed += kQueries * P::step) {
    typename P::Operand query[kVecs];
    for (int c = 0; c < kVecs; ++c) query[c] = P::read(packed + c * Vec::width * P::step);
    for (int r = 0; r < N; ++r) {
      const typename P::Operand key = P::repeat(keys.rows + r * keys.stride + i);
      for (int c = 0; c < kVecs; ++c) acc[r][c] = P::multiply_add(query[c], key, acc[r][c]);
    }
  }
  for (int r = 0; r < N; ++r) {
    for (int c = 0; c < kVecs; ++c) {
      store(logits + r * kQueries + c * Vec::width, mul(acc[r][c], splat(args.scale)));
    }
  }
}

LOCKIN_FAST_LOCAL Vec where(Ints condition, Vec a, Vec b) {
  return from_bits((reinterpret_cast<Words>(condition) & bits_of(a)) |
                   (~reinterpret_cast<Words>(condition) & bits_of(b)));
}

// -inf in the place of keys after the query, whatever they hold.
LOCKIN_FAST_LOCAL void mask_later(const Lanes& lanes, int64_t first, int64_t count, float* logits) {
  for (int64_t key = 0; key < count; ++key) {
    for (int c = 0; c < kVecs; ++c) {
      float* place = logits + key * kQueries + c * Vec::width;
      const Ints visible = lanes.position[c] >= static_cast<int32_t>(first + key);
      store(place, where(visible, load(place), splat(-INFINITY)));
    }
  }
}

// Adds the weights of N keys to one vector of queries' sums, and those on the stripe to their mass.
template <int N>
LOCKIN_FAST_LOCAL void add_keys(const float* logits, const int32_t* before, Ints token, Vec shift, Softmax* state) {
  const Vecs<N> weight = exp_nonpositive(each<N>([&](int i) { return sub(load(logits + i * kQueries), shift); }));
  for (int i = 0; i < N; ++i) {
    state->sum = add(state->sum, weight.v[i]);
    state->mass = add(state->mass, where(token == before[i], weight.v[i], zeros()));
  }
}

LOCKIN_FAST_LOCAL void add_tile(const Lanes& lanes, const int32_t* before, int64_t count, const float* logits,
                                Softmax* state) {
  constexpr int together = 4;
  for (int c = 0; c < kVecs; ++c, logits += Vec::width) {
    Softmax tile = {state[c].largest, zeros(), zeros()};
    for (int64_t key = 0; key < count; ++key) tile.largest = maximum(load(logits + key * kQueries), tile.largest);
    // -inf, where no key counts, would make -inf - -inf.
    const Vec shift = where(tile.largest.v == splat(-INFINITY).v, zeros(), tile.largest);
    int64_t key = 0;
    for (; key + together <= count; key += together) {
      add_keys<together>(logits + key * kQueries, before + key, lanes.token[c], shift, &tile);
    }
    for (; key < count; ++key) add_keys<1>(logits + key * kQueries, before + key, lanes.token[c], shift, &tile);
    const Vec factor = exp_nonpositive(sub(state[c].largest, shift));
    state[c] = {tile.largest, fma(state[c].sum, factor, tile.sum), fma(state[c].mass, factor, tile.mass)};
  }
}

template <class T>
double mass_on_stripe(const PrefixMatchingArgs& args, const int32_t* queries, int64_t count, void* room) {
  using Element = typename Product<T>::Element;
  float* logits = static_cast<float*>(room);
  Element* packed = reinterpret_cast<Element*>(logits + kTileKeys * kQueries);
  Element* converted = packed + kQueries * padded_to_step(args.width);
  pack_queries<T>(args, queries, count, packed);
  const Lanes lanes = lanes_of(args, queries, count);
  Softmax state[kVecs];
  for (Softmax& lane : state) lane = {splat(-INFINITY), zeros(), zeros()};

  const int64_t keys = queries[count - 1] + 1;
  for (int64_t first = 0; first < keys; first += kTileKeys) {
    const int64_t tile = keys - first < kTileKeys ? keys - first : kTileKeys;
    Keys<Element> part = keys_of(args, static_cast<const T*>(args.k) + first * args.k_stride, tile, converted);
    float* out = logits;
    int64_t left = tile;
    for (; left >= kKeys; left -= kKeys, part.rows += kKeys * part.stride, out += kKeys * kQueries) {
      multiply<kKeys, T>(args, part, packed, out);
    }
    for (; left > 0; --left, part.rows += part.stride, out += kQueries) multiply<1, T>(args, part, packed, out);
    if (first + tile - 1 > queries[0]) mask_later(lanes, first, tile, logits);
    add_tile(lanes, args.before + first, tile, logits, state);
  }

  float sum[kQueries], mass[kQueries];
  for (int c = 0; c < kVecs; ++c) {
    store(sum + c * Vec::width, state[c].sum);
    store(mass + c * Vec::width, state[c].mass);
  }
  double total = 0.0;
  for (int64_t lane = 0; lane < count; ++lane) total += static_cast<double>(mass[lane]) / static_cast<double>(sum[lane]);
  return total;
}

}  // namespace

namespace LOCKIN_FAST_UNIT {

int64_t prefix_matching_queries() { return kQueries; }

int64_t prefix_matching_room(int64_t width) {
  return static_cast<int64_t>(sizeof(float)) * (kTileKeys * kQueries + (kQueries + kTileKeys) * padded_to_step(width));
}

double prefix_matching(const PrefixMatchingArgs& args, const int32_t* queries, int64_t count, void* room) {
  switch (args.dtype) {
    case Dtype::f32: return mass_on_stripe<float>(args, queries, count, room);
    case Dtype::f16: return mass_on_stripe<f16>(args, queries, count, room);
    default: return mass_on_stripe<bf16>(args, queries, count, room);
  }
}

}  // namespace LOCKIN_FAST_UNIT
}  // namespace lockin_fast
