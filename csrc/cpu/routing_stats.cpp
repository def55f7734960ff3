// One token at a time, its logits in L1: softmax, its entropy, and the largest few.
#include "routing_stats.h"

#include "exp_log.h"

namespace lockin_fast {
namespace {

constexpr int64_t kFold = 32;  // tokens whose probabilities are added up in fp32 before they are in fp64
constexpr float kInfinity = __builtin_inff();

LOCKIN_FAST_LOCAL int64_t padded_experts(int64_t experts) {
  return (experts + Vec::width - 1) / Vec::width * Vec::width;
}

// Logits in fp32, -inf past the last expert.
template <class T>
LOCKIN_FAST_LOCAL void widen(const T* logits, int64_t experts, float* x) {
  int64_t i = 0;
  for (; i + Vec::width <= experts; i += Vec::width) store(x + i, load(logits + i));
  if (i == experts) return;
  store(x + i, load_first(logits + i, experts - i));
  for (int64_t e = experts; e < i + Vec::width; ++e) x[e] = -kInfinity;
}

// The k largest, the lower expert first among equals; NaN ranks as Inf.
LOCKIN_FAST_LOCAL void choose_experts(const float* x, int64_t experts, int64_t k, float* best, int32_t* chosen) {
  int64_t count = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const float value = x[e] == x[e] ? x[e] : kInfinity;
    if (count == k && !(value > best[k - 1])) continue;
    int64_t place = count < k ? count++ : k - 1;
    for (; place > 0 && value > best[place - 1]; --place) {
      best[place] = best[place - 1];
      chosen[place] = chosen[place - 1];
    }
    best[place] = value;
    chosen[place] = static_cast<int32_t>(e);
  }
}

// log sigmoid(x) = min(x, 0) - log(1 + e^-|x|), the logarithm by d ln d = excess + d - 1.
LOCKIN_FAST_LOCAL Vec log_sigmoid(Vec x) {
  const Vec negated = sub(zeros(), x);
  const Vec power = exp_nonpositive(sub(zeros(), maximum(x, negated)));
  const Vec d = add(splat(1.0f), power);
  const Vec log_d = {add(tangent_excess(Vecs<1>{{d}}).v[0], power).v / d.v};
  return sub(sub(zeros(), maximum(zeros(), negated)), log_d);
}

// Adds the token's probabilities to `sums` and returns its entropy.
LOCKIN_FAST_LOCAL float add_softmax(float* x, int64_t padded, float* sums) {
  float top = -kInfinity, lanes[Vec::width], other[Vec::width];
  for (int64_t e = 0; e < padded; ++e) top = x[e] > top ? x[e] : top;
  Vec mass = zeros(), moment = zeros();
  for (int64_t e = 0; e < padded; e += Vec::width) {
    const Vec shifted = maximum(splat(-88.0f), sub(load(x + e), splat(top)));  // 0 * -inf is no NaN then
    const Vec power = exp_nonpositive(shifted);
    store(x + e, power);
    mass = add(mass, power);
    moment = fma(power, shifted, moment);
  }
  store(lanes, mass);
  store(other, moment);
  float total = 0.0f, weighted = 0.0f;
  for (int i = 0; i < Vec::width; ++i) {
    total += lanes[i];
    weighted += other[i];
  }
  const Vec inverse = splat(1.0f / total);
  for (int64_t e = 0; e < padded; e += Vec::width) store(sums + e, fma(load(x + e), inverse, load(sums + e)));
  return __builtin_logf(total) - weighted / total;
}

LOCKIN_FAST_LOCAL void fold(float* sums, int64_t experts, double* probability) {
  for (int64_t e = 0; e < experts; ++e) {
    probability[e] += sums[e];
    sums[e] = 0.0f;
  }
}

template <class T>
void sum_chunk(const RoutingArgs& args, int64_t chunk, const RoutingRoom& room) {
  const int64_t experts = args.experts, padded = padded_experts(experts), begin = chunk * kRoutingChunk;
  const int64_t end = begin + kRoutingChunk < args.tokens ? begin + kRoutingChunk : args.tokens;
  float *x = room.floats, *sums = x + padded, *best = sums + padded;
  double* probability = args.probability + chunk * experts;
  double entropy = 0.0;
  int64_t counted = 0;
  for (int64_t e = 0; e < experts; ++e) probability[e] = 0.0;
  for (int64_t e = 0; e < padded; ++e) sums[e] = 0.0f;
  for (int64_t token = begin; token < end; ++token) {
    if (args.mask && !args.mask[token]) continue;
    widen(static_cast<const T*>(args.logits) + token * args.stride, experts, x);
    choose_experts(x, experts, args.top_k, best, room.chosen);
    const int64_t given = args.classes ? args.classes[token] : -1;
    int64_t* row = room.table + (given >= 0 && given < args.num_classes ? given : args.num_classes) * experts;
    for (int64_t k = 0; k < args.top_k; ++k) ++row[room.chosen[k]];
    for (int64_t e = 0; args.sigmoid && e < padded; e += Vec::width) store(x + e, log_sigmoid(load(x + e)));
    entropy += add_softmax(x, padded, sums);
    if (++counted % kFold == 0) fold(sums, experts, probability);
  }
  fold(sums, experts, probability);
  args.entropy[chunk] = entropy;
  args.counted[chunk] = counted;
}

}  // namespace

namespace LOCKIN_FAST_UNIT {

int64_t routing_floats(int64_t experts) { return 2 * padded_experts(experts); }

void routing_stats(const RoutingArgs& args, int64_t chunk, const RoutingRoom& room) {
  switch (args.dtype) {
    case Dtype::f32: return sum_chunk<float>(args, chunk, room);
    case Dtype::f16: return sum_chunk<f16>(args, chunk, room);
    case Dtype::bf16: return sum_chunk<bf16>(args, chunk, room);
  }
}

}  // namespace LOCKIN_FAST_UNIT
}  // namespace lockin_fast
