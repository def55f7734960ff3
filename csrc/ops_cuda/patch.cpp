#include "../cuda/patch.h"

#include "tensors.h"

namespace lockin_fast {
namespace {

void patch_(Tensor& h, const Tensor& rows, const Tensor& source) {
  STD_TORCH_CHECK(h.dim() == 2 && rows_are_contiguous(h), "h must be [N, d] with contiguous rows");
  check_float(h, "h");
  check_vector(rows, "rows", rows.size(0), ScalarType::Long);
  check_matrix(source, "source", rows.size(0), h.size(1), h.scalar_type());
  check_device(rows, "rows", h, "h");
  check_device(source, "source", h, "h");
  const Tensor from = with_contiguous_rows(source);

  PatchParams params{};
  params.h = static_cast<char*>(h.mutable_data_ptr());
  params.rows = static_cast<const int64_t*>(rows.const_data_ptr());
  params.source = static_cast<const char*>(from.const_data_ptr());
  params.h_stride = row_stride_bytes(h);
  params.source_stride = row_stride_bytes(from);
  params.row_bytes = h.size(1) * static_cast<int64_t>(h.element_size());
  params.tokens = h.size(0);
  params.count = rows.size(0);
  run(patch, params, h);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lockin_fast, CUDA, library) {
  if (asked_for("patch_")) library.impl("patch_", TORCH_BOX(&patch_));
}

}  // namespace lockin_fast
