// A row's direction is widened to fp32 and its scale computed once; both stay in the cache while the positions stream by.
#include "steer.h"

#include "norm.h"

namespace lockin_fast {
namespace {

constexpr int kStrip = 4;
constexpr int64_t kAheadBytes = 2048;  // the next positions are fetched this far ahead
// Scales that fp32 holds to its full precision.
constexpr double kSmallestScale = 1e-30, kLargestScale = 1e30;

// What a row adds to each of its positions: scale * direction; nothing when there is no direction.
struct Step {
  const float* direction;
  float scale;
};

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

Step step_of(const SteerArgs& args, int64_t r, float* room) {
  const int64_t index = args.index[r];
  if (args.coefficient[r] == 0.0f || index < 0 || index >= args.count) return {nullptr, 0.0f};
  const float* direction = direction_of(args, index, room);
  const double length = norm(direction, args.width);
  if (length == 0.0) return {nullptr, 0.0f};
  const double scale = args.coefficient[r] / length, size = __builtin_fabs(scale);
  if (size >= kSmallestScale && size <= kLargestScale) return {direction, static_cast<float>(scale)};
  for (int64_t i = 0; i < args.width; ++i) room[i] = static_cast<float>(direction[i] * scale);
  return {room, 1.0f};
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
