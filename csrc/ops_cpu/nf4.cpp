#include "../cpu/nf4.h"

#include <tuple>

#include "../cpu/huge_pages.h"
#include "nf4_rows.h"

namespace lockin_fast {
namespace {

Tensor empty_matrix(int64_t rows, int64_t columns, ScalarType dtype) {
  const int64_t shape[] = {rows, columns};
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape, 2), dtype);
}

std::tuple<Tensor, Tensor, Tensor> nf4_quantize(const Tensor& h, int64_t blocksize, const OptionalTensor& channels) {
  STD_TORCH_CHECK(h.dim() == 2 && h.is_cpu(), "h must be a [T, d] tensor on the CPU");
  const int64_t tokens = h.size(0), width = h.size(1), count = channels ? channels->numel() : 0;
  check_blocks(width, blocksize);
  const Tensor rows = with_contiguous_rows(h);
  Tensor codes = empty_matrix(tokens, width / 2, ScalarType::Byte);
  Tensor absmax = empty_floats({tokens, width / blocksize});
  Tensor outliers = empty_matrix(tokens, count, h.scalar_type());

  Nf4QuantizeArgs args{};
  args.dtype = dtype_of(h, "h");
  args.h = rows.const_data_ptr();
  args.h_stride = rows.stride(0);
  args.channels = outlier_channels(channels, width);
  args.channel_count = count;
  args.width = width;
  args.blocksize = blocksize;
  args.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  args.absmax = static_cast<float*>(absmax.mutable_data_ptr());
  args.outliers = outliers.mutable_data_ptr();
  advise_huge_pages(args.codes, tokens * width / 2);

  static const auto kernel = LOCKIN_FAST_CHOOSE(nf4_quantize);
  for_token_tiles(tokens, [&](int64_t begin, int64_t end) {
    const Room block(count ? blocksize * static_cast<int64_t>(h.element_size()) : 0);
    kernel(args, begin, end, block.data);
  });
  return {codes, absmax, outliers};
}

Tensor nf4_dequantize(const Tensor& codes, const Tensor& absmax, const OptionalTensor& channels,
                      const OptionalTensor& outliers, int64_t blocksize, ScalarType dtype) {
  const Nf4Operand operand = nf4_operand(codes, absmax, channels, outliers, blocksize, dtype);
  Tensor out = empty_matrix(codes.size(0), operand.rows.width, dtype);
  const Dtype chosen = dtype_of(out, "dtype");
  void* data = out.mutable_data_ptr();
  advise_huge_pages(data, codes.size(0) * operand.rows.width * static_cast<int64_t>(out.element_size()));
  static const auto kernel = LOCKIN_FAST_CHOOSE(nf4_dequantize);
  for_token_tiles(codes.size(0), [&](int64_t begin, int64_t end) { kernel(operand.rows, chosen, data, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lockin_fast, CPU, library) {
  library.impl("nf4_quantize", TORCH_BOX(&nf4_quantize));
  library.impl("nf4_dequantize", TORCH_BOX(&nf4_dequantize));
}

}  // namespace lockin_fast
