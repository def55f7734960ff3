#include "../cpu/patch.h"

#include "nf4_rows.h"

namespace lockin_fast {
namespace {

constexpr int64_t kBytesPerTask = int64_t{1} << 18;  // what is worth another thread

PatchArgs patch_args(Tensor& h, const Tensor& rows) {
  STD_TORCH_CHECK(h.is_cpu() && h.dim() == 2, "h must be a [N, d] tensor on the CPU");
  STD_TORCH_CHECK(h.size(1) <= 1 || h.stride(1) == 1, "h must have contiguous rows to be written in place");
  PatchArgs args{};
  args.h = static_cast<char*>(h.mutable_data_ptr());
  args.h_stride = h.stride(0) * static_cast<int64_t>(h.element_size());
  args.rows = indices(rows, "rows");
  args.row_bytes = h.size(1) * static_cast<int64_t>(h.element_size());
  args.tokens = h.size(0);
  args.positions = rows.numel();
  return args;
}

template <class Body>
void for_positions(const PatchArgs& args, const Body& body) {
  if (args.row_bytes == 0) return;
  const int64_t grain = (kBytesPerTask + args.row_bytes - 1) / args.row_bytes;
  torch::stable::parallel_for(0, args.positions, grain, body);
}

void patch_(Tensor& h, const Tensor& rows, const Tensor& source) {
  PatchArgs args = patch_args(h, rows);
  check_matrix(source, "source", args.positions, h.size(1));
  check_same_dtype(source, "source", h, "h");
  const Tensor from = with_contiguous_rows(source);
  args.source = static_cast<const char*>(from.const_data_ptr());
  args.source_stride = from.stride(0) * static_cast<int64_t>(h.element_size());
  static const auto kernel = LOCKIN_FAST_CHOOSE(patch);
  for_positions(args, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

void patch_nf4_(Tensor& h, const Tensor& rows, const Tensor& codes, const Tensor& absmax,
                const OptionalTensor& channels, const OptionalTensor& outliers, int64_t blocksize) {
  const PatchArgs args = patch_args(h, rows);
  const Nf4Operand source = nf4_operand(codes, absmax, channels, outliers, blocksize, h.scalar_type());
  check_matrix(codes, "codes", args.positions, h.size(1) / 2);
  STD_TORCH_CHECK(source.rows.width == h.size(1), "codes must be of rows as wide as h");
  const Dtype dtype = dtype_of(h, "h");
  static const auto kernel = LOCKIN_FAST_CHOOSE(patch_nf4);
  for_positions(args, [&](int64_t begin, int64_t end) { kernel(args, source.rows, dtype, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lockin_fast, CPU, library) {
  library.impl("patch_", TORCH_BOX(&patch_));
  library.impl("patch_nf4_", TORCH_BOX(&patch_nf4_));
}

}  // namespace lockin_fast
