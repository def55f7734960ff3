// Rows copied one after the other; many of them past the caches, which they would not stay in anyway.
#include "patch.h"

#include "nf4_decode.h"
#include "stream.h"

namespace lockin_fast {
namespace {

constexpr int64_t kStreamedBytes = int64_t{4} << 20;  // from here on; fewer may well be read again from a cache
constexpr int64_t kPageBytes = 4096;

// The first line of every page: no hardware prefetcher looks over a page's end.
LOCKIN_FAST_LOCAL void touch_pages(const char* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kPageBytes) __builtin_prefetch(row + i, 0, 2);
}

template <class T>
void decode_to(const PatchArgs& args, const Nf4Rows& source, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; ++p) {
    const int64_t row = args.rows[p];
    if (row >= 0 && row < args.tokens) decode_row(source, p, reinterpret_cast<T*>(args.h + row * args.h_stride));
  }
}

}  // namespace

namespace LOCKIN_FAST_UNIT {

void patch_nf4(const PatchArgs& args, const Nf4Rows& source, Dtype dtype, int64_t begin, int64_t end) {
  switch (dtype) {
    case Dtype::f32: return decode_to<float>(args, source, begin, end);
    case Dtype::f16: return decode_to<f16>(args, source, begin, end);
    case Dtype::bf16: return decode_to<bf16>(args, source, begin, end);
  }
}

void patch(const PatchArgs& args, int64_t begin, int64_t end) {
  const bool streamed = args.positions * args.row_bytes >= kStreamedBytes;
  for (int64_t p = begin; p < end; ++p) {
    const int64_t row = args.rows[p];
    if (row < 0 || row >= args.tokens) continue;
    const char* from = args.source + p * args.source_stride;
    char* to = args.h + row * args.h_stride;
    if (p + 1 < end) touch_pages(from + args.source_stride, args.row_bytes);
    if (streamed) {
      stream_bytes(to, from, args.row_bytes);
    } else {
      memcpy(to, from, static_cast<size_t>(args.row_bytes));
    }
  }
  if (streamed) finish_streams();
}

}  // namespace LOCKIN_FAST_UNIT
}  // namespace lockin_fast
