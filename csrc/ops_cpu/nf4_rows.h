// The NF4 operands of an op, checked.
#pragma once

#include "../cpu/nf4.h"
#include "tensors.h"

namespace lockin_fast {

inline void check_blocks(int64_t width, int64_t blocksize) {
  STD_TORCH_CHECK(blocksize > 0 && blocksize % kNf4Step == 0 && width % blocksize == 0, "blocksize is ", blocksize,
                  ", it must be a multiple of ", kNf4Step, " that divides the width of ", width);
}

// Pointer to contiguous channels, ascending in [0, width), or null.
inline const int32_t* outlier_channels(const OptionalTensor& channels, int64_t width) {
  if (!channels || channels->numel() == 0) return nullptr;
  STD_TORCH_CHECK(channels->is_cpu() && channels->scalar_type() == ScalarType::Int && channels->dim() == 1 &&
                      channels->is_contiguous(),
                  "channels must be a contiguous int32 vector on the CPU");
  const int32_t* values = static_cast<const int32_t*>(channels->const_data_ptr());
  const auto inside = [width](int32_t channel) { return channel >= 0 && channel < width; };
  STD_TORCH_CHECK(std::all_of(values, values + channels->numel(), inside), "channels must lie in [0, ", width, ")");
  STD_TORCH_CHECK(std::is_sorted(values, values + channels->numel()), "channels must ascend");
  return values;
}

// Keeps what Nf4Rows points at alive.
struct Nf4Operand {
  Tensor codes, absmax;
  OptionalTensor channels, outliers;
  Nf4Rows rows;
};

// `dtype` is what the rows are decoded to.
inline Nf4Operand nf4_operand(const Tensor& codes, const Tensor& absmax, const OptionalTensor& channels,
                              const OptionalTensor& outliers, int64_t blocksize, ScalarType dtype) {
  STD_TORCH_CHECK(codes.dim() == 2 && codes.is_cpu() && codes.scalar_type() == ScalarType::Byte,
                  "codes must be a uint8 matrix on the CPU");
  const int64_t tokens = codes.size(0), width = 2 * codes.size(1);
  check_blocks(width, blocksize);
  check_matrix(absmax, "absmax", tokens, width / blocksize);
  STD_TORCH_CHECK(absmax.scalar_type() == ScalarType::Float, "absmax must be float32");
  Nf4Operand operand{torch::stable::contiguous(codes), torch::stable::contiguous(absmax), channels, {}, {}};
  operand.rows.codes = static_cast<const uint8_t*>(operand.codes.const_data_ptr());
  operand.rows.absmax = static_cast<const float*>(operand.absmax.const_data_ptr());
  operand.rows.width = width;
  operand.rows.blocksize = blocksize;
  operand.rows.channels = outlier_channels(channels, width);
  if (operand.rows.channels) {
    STD_TORCH_CHECK(outliers, "outliers must be given with channels");
    check_matrix(*outliers, "outliers", tokens, channels->numel());
    STD_TORCH_CHECK(outliers->scalar_type() == dtype, "outliers must have the dtype of the result");
    operand.outliers = torch::stable::contiguous(*outliers);
    operand.rows.outliers = operand.outliers->const_data_ptr();
    operand.rows.channel_count = channels->numel();
  }
  return operand;
}

}  // namespace lockin_fast
