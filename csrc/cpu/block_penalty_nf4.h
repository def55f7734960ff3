// block_penalty with its reference hidden state in NF4.
#pragma once

#include "block_penalty.h"
#include "nf4.h"

namespace lockin_fast {

// Tokens whose reference is decoded at a time; a few, so that the rows stay in L2 until they are multiplied.
constexpr int64_t kNf4Tokens = 8;

// `args` is without h_ref and z_ref; `decoded` holds kNf4Tokens rows, scratch what block_penalty's does.
LOCKIN_FAST_DECLARE(int64_t, block_penalty_nf4, const BlockPenaltyArgs& args, const Nf4Rows& reference, int64_t begin,
                    int64_t end, void* decoded, float* scratch)

}  // namespace lockin_fast
