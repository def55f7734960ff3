#include "../cuda/patch_diff.h"

#include <tuple>

#include "tensors.h"

namespace lockin_fast {
namespace {

std::tuple<Tensor, Tensor, Tensor> differences(const Tensor& h, const Tensor& rows, const Tensor& source,
                                               const Tensor& weight, const OptionalTensor& bias,
                                               const OptionalTensor& threshold) {
  STD_TORCH_CHECK(h.dim() == 2 && weight.dim() == 2, "h must be [N, d] and weight [K, d]");
  const int64_t count = rows.size(0), width = h.size(1), latents = weight.size(0);
  check_vector(rows, "rows", count, ScalarType::Long);
  check_matrix(source, "source", count, width, h.scalar_type());
  check_matrix(weight, "weight", latents, width, h.scalar_type());
  check_device(rows, "rows", h, "h");
  check_device(source, "source", h, "h");
  check_device(weight, "weight", h, "h");
  const Tensor before = with_contiguous_rows(h), after = with_contiguous_rows(source);
  const Tensor latent_rows = with_contiguous_rows(weight);
  Tensor norm = empty_beside(h, {count}, ScalarType::Float);
  Tensor projection = empty_beside(h, {count, latents}, ScalarType::Float);
  Tensor change = empty_beside(h, {bias ? count : 0, bias ? latents : 0}, ScalarType::Float);

  PatchDiffParams params{};
  params.dtype = dtype_of(h, "h");
  params.h = before.const_data_ptr();
  params.h_stride = before.stride(0);
  params.rows = static_cast<const int64_t*>(rows.const_data_ptr());
  params.source = after.const_data_ptr();
  params.source_stride = after.stride(0);
  params.weight = latent_rows.const_data_ptr();
  params.weight_stride = latent_rows.stride(0);
  params.bias = latent_vector(bias, "bias", weight);
  params.threshold = latent_vector(threshold, "threshold", weight);
  params.tokens = h.size(0);
  params.count = count;
  params.width = width;
  params.latents = latents;
  params.norm = static_cast<float*>(norm.mutable_data_ptr());
  params.projection = static_cast<float*>(projection.mutable_data_ptr());
  params.change = static_cast<float*>(change.mutable_data_ptr());
  run(patch_diff, params, h);
  return {norm, projection, change};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lockin_fast, CUDA, library) {
  if (asked_for("patch_diff")) library.impl("patch_diff", TORCH_BOX(&differences));
}

}  // namespace lockin_fast
