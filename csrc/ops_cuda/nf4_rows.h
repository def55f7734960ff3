// Rows in NF4 as the ops get them, checked, with what they point at kept alive.
#pragma once

#include "../cuda/nf4.h"
#include "tensors.h"

namespace lockin_fast {

struct Nf4Operand {
  Tensor codes, absmax;
  OptionalTensor channels, outliers;
  Nf4Rows rows;
};

inline void check_blocks(int64_t blocksize, int64_t width) {
  STD_TORCH_CHECK(blocksize >= kNf4SmallestBlock && blocksize <= kNf4LargestBlock && (blocksize & (blocksize - 1)) == 0,
                  "blocksize must be a power of two from 16 to 4096, got ", blocksize);
  STD_TORCH_CHECK(width % blocksize == 0, "the width must be a multiple of blocksize ", blocksize, ", got ", width);
}

inline const int32_t* outlier_channels(const Tensor& channels, const Tensor& beside) {
  check_vector(channels, "channels", channels.size(0), ScalarType::Int);
  check_device(channels, "channels", beside, "the rows");
  return static_cast<const int32_t*>(channels.const_data_ptr());
}

inline Nf4Operand nf4_operand(const Tensor& codes, const Tensor& absmax, const OptionalTensor& channels,
                              const OptionalTensor& outliers, int64_t blocksize, ScalarType dtype) {
  STD_TORCH_CHECK(codes.dim() == 2, "codes must be [T, d / 2]");
  const int64_t tokens = codes.size(0), width = 2 * codes.size(1);
  check_blocks(blocksize, width);
  check_matrix(codes, "codes", tokens, width / 2, ScalarType::Byte);
  check_matrix(absmax, "absmax", tokens, width / blocksize, ScalarType::Float);
  check_device(absmax, "absmax", codes, "codes");
  STD_TORCH_CHECK(channels.has_value() == outliers.has_value(), "channels and outliers must be given together");
  Nf4Operand nf4{torch::stable::contiguous(codes), torch::stable::contiguous(absmax), channels, {}, {}};
  nf4.rows.codes = static_cast<const uint8_t*>(nf4.codes.const_data_ptr());
  nf4.rows.absmax = static_cast<const float*>(nf4.absmax.const_data_ptr());
  nf4.rows.blocksize = blocksize;
  if (channels) {
    check_matrix(*outliers, "outliers", tokens, channels->size(0), dtype);
    check_device(*outliers, "outliers", codes, "codes");
    nf4.outliers = torch::stable::contiguous(*outliers);
    nf4.rows.channels = outlier_channels(*channels, codes);
    nf4.rows.outliers = nf4.outliers->const_data_ptr();
    nf4.rows.outlier_count = channels->size(0);
  }
  return nf4;
}

}  // namespace lockin_fast
