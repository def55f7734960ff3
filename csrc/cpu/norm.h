// The Euclidean norm of a row, whatever the size of its numbers.
#pragma once

#include "vec.h"

namespace lockin_fast {
namespace {

// Sums of squares that fp32 holds to its full precision.
constexpr float kSmallestSquares = 1e-20f, kLargestSquares = 1e38f;

LOCKIN_FAST_LOCAL float sum_squares(const float* v, int64_t n) {
  constexpr int kStrip = 4;
  Vec acc[kStrip];
  for (Vec& lane : acc) lane = zeros();
  int64_t i = 0;
  for (; i + kStrip * Vec::width <= n; i += kStrip * Vec::width) {
    for (int j = 0; j < kStrip; ++j) {
      const Vec x = load(v + i + j * Vec::width);
      acc[j] = fma(x, x, acc[j]);
    }
  }
  float lanes[Vec::width], sum = 0.0f;
  store(lanes, add(add(acc[0], acc[1]), add(acc[2], acc[3])));
  for (; i < n; ++i) sum += v[i] * v[i];
  for (float lane : lanes) sum += lane;
  return sum;
}

// ||v||_2. Where the squares leave the range of fp32, as they do long before the numbers, they are summed in fp64.
LOCKIN_FAST_LOCAL double norm(const float* v, int64_t n) {
  const float fast = sum_squares(v, n);
  if (fast >= kSmallestSquares && fast <= kLargestSquares) return __builtin_sqrt(static_cast<double>(fast));
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(v[i]) * v[i];
  return __builtin_sqrt(sum);
}

}  // namespace
}  // namespace lockin_fast
