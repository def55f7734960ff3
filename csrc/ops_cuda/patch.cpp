#include "../cuda/patch.h"

#include "nf4_rows.h"

namespace lockin_fast {
namespace {

void check_patch(const Tensor& h, const Tensor& rows) {
  STD_TORCH_CHECK(h.dim() == 2 && rows_are_contiguous(h), "h must be [N, d] with contiguous rows");
  dtype_of(h, "h");
  check_vector(rows, "rows", rows.size(0), ScalarType::Long);
  check_device(rows, "rows", h, "h");
}

void patch_(Tensor& h, const Tensor& rows, const Tensor& source) {
  check_patch(h, rows);
  check_matrix(source, "source", rows.size(0), h.size(1), h.scalar_type());
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

void patch_nf4_(Tensor& h, const Tensor& rows, const Tensor& codes, const Tensor& absmax,
                const OptionalTensor& channels, const OptionalTensor& outliers, int64_t blocksize) {
  check_patch(h, rows);
  check_matrix(codes, "codes", rows.size(0), h.size(1) / 2, ScalarType::Byte);
  check_device(codes, "codes", h, "h");
  const Nf4Operand nf4 = nf4_operand(codes, absmax, channels, outliers, blocksize, h.scalar_type());

  Nf4DecodeParams params{};
  params.dtype = dtype_of(h, "h");
  params.nf4 = nf4.rows;
  params.count = rows.size(0);
  params.width = h.size(1);
  params.rows = static_cast<const int64_t*>(rows.const_data_ptr());
  params.out = h.mutable_data_ptr();
  params.out_stride = h.stride(0);
  params.out_rows = h.size(0);
  run(nf4_decode, params, h);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lockin_fast, CUDA, library) {
  if (asked_for("patch_")) library.impl("patch_", TORCH_BOX(&patch_));
  if (asked_for("patch_nf4_")) library.impl("patch_nf4_", TORCH_BOX(&patch_nf4_));
}

}  // namespace lockin_fast
