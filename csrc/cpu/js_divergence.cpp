// Generalised Jensen-Shannon divergence of n next-token distributions, one position after the other.
//
// The first pass over a position's n rows finds each row's largest logit and sum of exponentials; the second takes all
// rows together, a few columns at a time, from the caches that the first left them in.
#include "js_divergence.h"

#include <cfloat>
#include <cmath>

#include "exp_log.h"

namespace lockin_fast {
namespace {

constexpr int kVecs = 4;               // columns are taken this many vectors at a time
constexpr int64_t kTileVectors = 128;  // a tile of a row, read twice while it is in L1

template <int B>
constexpr int size_of(const Vecs<B>&) {
  return B;
}

template <class T>
struct Row {
  const T* logits;
  float weight;
  float shift;  // the largest logit
  float scale;  // 1 / sum of e^(logit - shift)
};

// The first n < width elements; the rest reads as -inf, a probability of 0.
template <class T>
LOCKIN_FAST_LOCAL Vec load_banned_after(const T* p, int64_t n) {
  T padded[Vec::width];
  for (T& x : padded) from_float(-INFINITY, &x);
  memcpy(padded, p, static_cast<size_t>(n) * sizeof(T));
  return load(padded);
}

LOCKIN_FAST_LOCAL double sum_of_lanes(Vec a) {
  float lanes[Vec::width];
  store(lanes, a);
  double total = 0.0;
  for (float lane : lanes) total += static_cast<double>(lane);
  return total;
}

LOCKIN_FAST_LOCAL float largest_lane(Vec a) {
  float lanes[Vec::width];
  store(lanes, a);
  float largest = lanes[0];
  for (float lane : lanes) largest = largest > lane ? largest : lane;
  return largest;
}

// -inf, where nothing is allowed yet, would make -inf - -inf of a banned token.
LOCKIN_FAST_LOCAL float finite_shift(float largest) { return largest == -INFINITY ? 0.0f : largest; }

// Calls step(vectors of logits) for n logits, B vectors at a time, and one at a time for what is left.
template <int B, class T, class Step>
LOCKIN_FAST_LOCAL void for_vectors(const T* p, int64_t n, const Step& step) {
  constexpr int64_t width = Vec::width;
  int64_t i = 0;
  for (; i + B * width <= n; i += B * width) step(each<B>([&](int b) { return load(p + i + b * width); }));
  for (; i + width <= n; i += width) step(Vecs<1>{{load(p + i)}});
  if (i < n) step(Vecs<1>{{load_banned_after(p + i, n - i)}});
}

// Online over tiles: whenever a larger logit turns up, what was summed before is scaled down. A NaN may be lost among
// the maxima, but not in the sum.
template <class T>
void normalise(Row<T>* row, int64_t vocabulary) {
  float largest = -INFINITY;
  double total = 0.0;
  for (int64_t v = 0; v < vocabulary; v += kTileVectors * Vec::width) {
    const int64_t n = vocabulary - v < kTileVectors * Vec::width ? vocabulary - v : kTileVectors * Vec::width;
    Vec top[kVecs], sums[kVecs];
    for (int b = 0; b < kVecs; ++b) {
      top[b] = splat(largest);
      sums[b] = zeros();
    }
    for_vectors<kVecs>(row->logits + v, n, [&](const auto& x) {
      for (int b = 0; b < size_of(x); ++b) top[b] = maximum(x.v[b], top[b]);
    });
    const float raised = largest_lane(maximum(maximum(top[0], top[1]), maximum(top[2], top[3])));
    const float shift = finite_shift(raised);
    for_vectors<kVecs>(row->logits + v, n, [&](auto x) {
      for (Vec& part : x.v) part = sub(part, splat(shift));
      x = exp_nonpositive(x);
      for (int b = 0; b < size_of(x); ++b) sums[b] = add(sums[b], x.v[b]);
    });
    total = total * std::exp(static_cast<double>(largest) - static_cast<double>(shift)) +
            sum_of_lanes(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
    largest = raised;
  }
  row->shift = finite_shift(largest);
  row->scale = static_cast<float>(1.0 / total);
}

// Adds, for B vectors of columns, m times the weighted mean over rows of r ln r - r + 1, with r = p / m: the terms
// p ln(p / m) less what cancels among them, p - m. read(row, b) gives a vector of logits.
template <int B, class T, class Read>
LOCKIN_FAST_LOCAL Vec divergence(const Row<T>* rows, int64_t count, Vec* p, Vec total, const Read& read) {
  Vec mean[B], inverse[B], excess[B];
  for (int b = 0; b < B; ++b) mean[b] = excess[b] = zeros();
  for (int64_t i = 0; i < count; ++i) {
    const Vecs<B> weight = exp_nonpositive(each<B>([&](int b) { return sub(read(rows[i], b), splat(rows[i].shift)); }));
    for (int b = 0; b < B; ++b) {
      p[i * B + b] = mul(weight.v[b], splat(rows[i].scale));
      mean[b] = fma(p[i * B + b], splat(rows[i].weight), mean[b]);
    }
  }
  // A token that is banned in every row has r = 0 and the weight 0.
  for (int b = 0; b < B; ++b) inverse[b] = {splat(1.0f).v / maximum(splat(FLT_MIN), mean[b]).v};
  for (int64_t i = 0; i < count; ++i) {
    const Vecs<B> terms = tangent_excess(each<B>([&](int b) { return mul(p[i * B + b], inverse[b]); }));
    for (int b = 0; b < B; ++b) excess[b] = fma(terms.v[b], splat(rows[i].weight), excess[b]);
  }
  for (int b = 0; b < B; ++b) total = fma(mean[b], excess[b], total);
  return total;
}

template <class T>
double divergence_of(const Row<T>* rows, int64_t count, int64_t vocabulary, Vec* p) {
  constexpr int64_t width = Vec::width;
  double total = 0.0;
  int64_t v = 0;
  while (v + kVecs * width <= vocabulary) {
    Vec sum = zeros();
    for (int64_t i = 0; i < kTileVectors && v + kVecs * width <= vocabulary; i += kVecs, v += kVecs * width) {
      sum = divergence<kVecs>(rows, count, p, sum, [&](const Row<T>& row, int b) {
        return load(row.logits + v + b * width);
      });
    }
    total += sum_of_lanes(sum);
  }
  for (; v < vocabulary; v += width) {
    const int64_t n = vocabulary - v;
    total += sum_of_lanes(divergence<1>(rows, count, p, zeros(), [&](const Row<T>& row, int) {
      return n < width ? load_banned_after(row.logits + v, n) : load(row.logits + v);
    }));
  }
  return total;
}

template <class T>
void divergences(const JsDivergenceArgs& args, int64_t first, int64_t last, void* room) {
  Vec* p = static_cast<Vec*>(room);
  Row<T>* rows = reinterpret_cast<Row<T>*>(p + args.prompts * kVecs);
  const float bound = static_cast<float>(std::log2(static_cast<double>(args.prompts)));
  for (int64_t s = first; s < last; ++s) {
    int64_t count = 0;
    for (int64_t i = 0; i < args.prompts; ++i) {
      if (args.weights[i] == 0.0f) continue;
      Row<T>* row = rows + count++;
      row->logits = static_cast<const T*>(args.logits) + i * args.prompt_stride + s * args.position_stride;
      row->weight = args.weights[i];
      normalise(row, args.vocabulary);
    }
    const float bits = static_cast<float>(divergence_of(rows, count, args.vocabulary, p) * M_LOG2E);
    args.bits[s] = bits > bound ? bound : bits;  // rounding only; NaN stays
  }
}

}  // namespace

namespace LOCKIN_FAST_UNIT {

int64_t js_divergence_room(const JsDivergenceArgs& args) {
  return args.prompts * static_cast<int64_t>(kVecs * sizeof(Vec) + sizeof(Row<float>));
}

void js_divergence(const JsDivergenceArgs& args, int64_t first, int64_t last, void* room) {
  switch (args.dtype) {
    case Dtype::f32: return divergences<float>(args, first, last, room);
    case Dtype::f16: return divergences<f16>(args, first, last, room);
    case Dtype::bf16: return divergences<bf16>(args, first, last, room);
  }
}

}  // namespace LOCKIN_FAST_UNIT
}  // namespace lockin_fast
