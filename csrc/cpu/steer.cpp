// A row's direction is widened to fp32 and its scale computed once; both stay in the cache while the positions stream by.
#include "steer.h"

#include "vec.h"

namespace lockin_fast {
namespace {

constexpr int kStrip = 4;
constexpr int64_t kAheadBytes = 2048;  // the next positions are fetched this far ahead
// Sums of squares that fp32 holds to its full precision.
constexpr float kSmallest = 1e-20f, kLargest = 1e38f;

// What a row adds to each of its positions: scale * direction; nothing when there is no direction.
struct Step {
  const float* direction;
  float scale;
};

LOCKIN_FAST_LOCAL float sum_squares(const float* v, int64_t n) {
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

template <class T>
LOCKIN_FAST_LOCAL const float* widened(const T* from, int64_t n, float* room) {
  int64_t i = 0;
  for (; i + Vec::width <= n; i += Vec::width) store(room + i, load(from + i));
  if (i < n) store_first(room + i, load_first(from + i, n - i), n - i);
  return room;
}

const float* direction_of(const SteerArgs& args, int64_t index, float* room) {
  const int64_t offset = index * args.direction_stride;
  switch (args.direction_dtype) {
    case Dtype::f16: return widened(static_cast<const f16*>(args.directions) + offset, args.width, room);
    case Dtype::bf16: return widened(static_cast<const bf16*>(args.directions) + offset, args.width, room);
    default: return static_cast<const float*>(args.directions) + offset;
  }
}

// The step along a direction whose squares leave the range of fp32, or which holds NaN or Inf: in fp64, into room.
Step wide_step(const float* direction, float coefficient, int64_t n, float* room) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(direction[i]) * direction[i];
  if (sum == 0.0) return {nullptr, 0.0f};
  const double scale = coefficient / __builtin_sqrt(sum);
  for (int64_t i = 0; i < n; ++i) room[i] = static_cast<float>(direction[i] * scale);
  return {room, 1.0f};
}

Step step_of(const SteerArgs& args, int64_t r, float* room) {
  const int64_t index = args.index[r];
  if (args.coefficient[r] == 0.0f || index < 0 || index >= args.count) return {nullptr, 0.0f};
  const float* direction = direction_of(args, index, room);
  const float sum = sum_squares(direction, args.width);
  if (!(sum >= kSmallest && sum <= kLargest)) return wide_step(direction, args.coefficient[r], args.width, room);
  return {direction, args.coefficient[r] / __builtin_sqrtf(sum)};
}

template <class T>
LOCKIN_FAST_LOCAL void add_step(T* h, Step step, int64_t n) {
  const Vec scale = splat(step.scale);
  const float* v = step.direction;
  int64_t i = 0;
  for (; i + kStrip * Vec::width <= n; i += kStrip * Vec::width) {
    const char* ahead = reinterpret_cast<const char*>(h + i) + kAheadBytes;
    for (size_t line = 0; line < kStrip * Vec::width * sizeof(T); line += 64) __builtin_prefetch(ahead + line, 1, 2);
    for (int j = 0; j < kStrip; ++j) {
      T* place = h + i + j * Vec::width;
      store(place, fma(scale, load(v + i + j * Vec::width), load(place)));
    }
  }
  for (; i + Vec::width <= n; i += Vec::width) store(h + i, fma(scale, load(v + i), load(h + i)));
  if (i < n) store_first(h + i, fma(scale, load_first(v + i, n - i), load_first(h + i, n - i)), n - i);
}

template <class T>
void steer_tokens(const SteerArgs& args, int64_t begin, int64_t end, float* room) {
  for (int64_t token = begin; token < end;) {
    const int64_t r = token / args.positions;
    const int64_t last = (r + 1) * args.positions < end ? (r + 1) * args.positions : end;
    const Step step = step_of(args, r, room);
    if (step.direction) {
      T* row = static_cast<T*>(args.h) + r * args.row_stride;
      for (int64_t s = token - r * args.positions; s < last - r * args.positions; ++s) {
        add_step(row + s * args.stride, step, args.width);
      }
    }
    token = last;
  }
}

}  // namespace

namespace LOCKIN_FAST_UNIT {

void steer(const SteerArgs& args, int64_t begin, int64_t end, float* room) {
  switch (args.dtype) {
    case Dtype::f32: return steer_tokens<float>(args, begin, end, room);
    case Dtype::f16: return steer_tokens<f16>(args, begin, end, room);
    case Dtype::bf16: return steer_tokens<bf16>(args, begin, end, room);
  }
}

}  // namespace LOCKIN_FAST_UNIT
}  // namespace lockin_fast
