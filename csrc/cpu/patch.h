// Listed rows overwritten by others: a copy of bytes, whatever the dtype, or rows decoded from NF4.
#pragma once

#include "nf4.h"

namespace lockin_fast {

struct PatchArgs {
  char* h;              // [tokens, row_bytes]
  int64_t h_stride;     // in bytes, as the others
  const int64_t* rows;  // [P]; a row outside h is skipped
  const char* source;   // [P, row_bytes]
  int64_t source_stride;
  int64_t row_bytes;
  int64_t tokens;
  int64_t positions;    // P
};

LOCKIN_FAST_DECLARE(void, patch, const PatchArgs&, int64_t begin, int64_t end)
// From rows of NF4 instead of args.source, decoded to dtype.
LOCKIN_FAST_DECLARE(void, patch_nf4, const PatchArgs&, const Nf4Rows&, Dtype, int64_t begin, int64_t end)

}  // namespace lockin_fast
