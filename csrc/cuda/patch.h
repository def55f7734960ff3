// Listed rows overwritten by others: a copy of bytes, whatever the dtype.
#pragma once

#include <cstdint>

namespace lockin_fast {

struct PatchParams {
  char* h;              // [tokens, row_bytes]
  const int64_t* rows;  // [count]; a row outside h is skipped
  const char* source;   // [count, row_bytes]
  int64_t h_stride, source_stride, row_bytes;  // in bytes
  int64_t tokens, count;
};

// Null, or why the launch failed.
const char* patch(const PatchParams& params, void* stream);

}  // namespace lockin_fast
