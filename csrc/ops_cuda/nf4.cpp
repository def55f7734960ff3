#include "../cuda/nf4.h"

#include <tuple>

#include "nf4_rows.h"

namespace lockin_fast {
namespace {

std::tuple<Tensor, Tensor, Tensor> quantize(const Tensor& h, int64_t blocksize, const OptionalTensor& channels) {
  STD_TORCH_CHECK(h.dim() == 2, "h must be [T, d]");
  const int64_t tokens = h.size(0), width = h.size(1), count = channels ? channels->size(0) : 0;
  check_blocks(blocksize, width);
  Nf4QuantizeParams params{};
  params.dtype = dtype_of(h, "h");
  const Tensor rows = with_contiguous_rows(h);
  Tensor codes = empty_beside(h, {tokens, width / 2}, ScalarType::Byte);
  Tensor absmax = empty_beside(h, {tokens, width / blocksize}, ScalarType::Float);
  Tensor outliers = empty_beside(h, {tokens, count}, h.scalar_type());
  params.h = rows.const_data_ptr();
  params.h_stride = rows.stride(0);
  params.channels = channels ? outlier_channels(*channels, h) : nullptr;
  params.channel_count = count;
  params.tokens = tokens;
  params.width = width;
  params.blocksize = blocksize;
  params.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  params.absmax = static_cast<float*>(absmax.mutable_data_ptr());
  params.outliers = outliers.mutable_data_ptr();
  run(nf4_quantize, params, h);
  return {codes, absmax, outliers};
}

Tensor dequantize(const Tensor& codes, const Tensor& absmax, const OptionalTensor& channels,
                  const OptionalTensor& outliers, int64_t blocksize, ScalarType dtype) {
  const Nf4Operand nf4 = nf4_operand(codes, absmax, channels, outliers, blocksize, dtype);
  Tensor out = empty_beside(codes, {codes.size(0), 2 * codes.size(1)}, dtype);
  Nf4DecodeParams params{};
  params.dtype = dtype_of(out, "dtype");
  params.nf4 = nf4.rows;
  params.count = params.out_rows = out.size(0);
  params.width = params.out_stride = out.size(1);
  params.out = out.mutable_data_ptr();
  run(nf4_decode, params, codes);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lockin_fast, CUDA, library) {
  if (asked_for("nf4_quantize")) library.impl("nf4_quantize", TORCH_BOX(&quantize));
  if (asked_for("nf4_dequantize")) library.impl("nf4_dequantize", TORCH_BOX(&dequantize));
}

}  // namespace lockin_fast
