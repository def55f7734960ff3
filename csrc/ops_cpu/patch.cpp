#include "../cpu/patch.h"

#include "tensors.h"

namespace lockin_fast {
namespace {

constexpr int64_t kBytesPerTask = int64_t{1} << 18;  // what is worth another thread

void patch_(Tensor& h, const Tensor& rows, const Tensor& source) {
  STD_TORCH_CHECK(h.is_cpu() && h.dim() == 2, "h must be a [N, d] tensor on the CPU");
  STD_TORCH_CHECK(h.size(1) <= 1 || h.stride(1) == 1, "h must have contiguous rows to be written in place");
  check_matrix(source, "source", rows.numel(), h.size(1));
  check_same_dtype(source, "source", h, "h");
  const Tensor from = with_contiguous_rows(source);
  const int64_t element = static_cast<int64_t>(h.element_size());

  PatchArgs args{};
  args.h = static_cast<char*>(h.mutable_data_ptr());
  args.h_stride = h.stride(0) * element;
  args.rows = indices(rows, "rows");
  args.source = static_cast<const char*>(from.const_data_ptr());
  args.source_stride = from.stride(0) * element;
  args.row_bytes = h.size(1) * element;
  args.tokens = h.size(0);
  args.positions = rows.numel();
  if (args.row_bytes == 0) return;
  static const auto kernel = LOCKIN_FAST_CHOOSE(patch);
  const int64_t grain = (kBytesPerTask + args.row_bytes - 1) / args.row_bytes;
  torch::stable::parallel_for(0, args.positions, grain,
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lockin_fast, CPU, library) {
  library.impl("patch_", TORCH_BOX(&patch_));
}

}  // namespace lockin_fast
