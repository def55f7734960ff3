#include "../cuda/block_penalty.h"

#include <tuple>

#include "nf4_rows.h"

namespace lockin_fast {
namespace {

using Penalty = std::tuple<Tensor, Tensor, Tensor>;

// Runs the kernel once `params` holds the reference; the tensors that it points at are the caller's to keep.
Penalty penalise(BlockPenaltyParams params, const Tensor& h, const Tensor& weight, const Tensor& bias,
                 const Tensor& sign, const OptionalTensor& mask, const OptionalTensor& threshold,
                 const OptionalTensor& margin, bool mean) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight must be [K, d]");
  check_matrix(weight, "weight", weight.size(0), h.size(1), h.scalar_type());
  check_device(weight, "weight", h, "h");
  const int64_t tokens = h.size(0), latents = weight.size(0);
  const Tensor rows = with_contiguous_rows(h), latent_rows = with_contiguous_rows(weight);
  Tensor per_token = empty_beside(h, {tokens}, ScalarType::Float);
  Tensor coefficient = empty_beside(h, {tokens, latents}, ScalarType::Float);
  Tensor active = empty_beside(h, {}, ScalarType::Long);
  torch::stable::zero_(active);
  if (latents == 0) torch::stable::zero_(per_token);

  params.dtype = dtype_of(h, "h");
  params.h = rows.const_data_ptr();
  params.h_stride = rows.stride(0);
  params.weight = latent_rows.const_data_ptr();
  params.weight_stride = latent_rows.stride(0);
  params.bias = latent_vector(bias, "bias", weight);
  params.sign = latent_vector(sign, "sign", weight);
  params.threshold = latent_vector(threshold, "threshold", weight);
  params.margin = latent_vector(margin, "margin", weight);
  if (mask) {
    check_vector(*mask, "mask", tokens, ScalarType::Bool);
    check_device(*mask, "mask", h, "h");
    params.mask = static_cast<const bool*>(mask->const_data_ptr());
  }
  params.tokens = tokens;
  params.latents = latents;
  params.width = h.size(1);
  params.unit = mean && latents > 0 ? 1.0f / static_cast<float>(latents) : 1.0f;
  params.per_token = static_cast<float*>(per_token.mutable_data_ptr());
  params.coefficient = static_cast<float*>(coefficient.mutable_data_ptr());
  params.active = static_cast<unsigned long long*>(active.mutable_data_ptr());
  run(block_penalty, params, h);
  return {per_token, coefficient, active};
}

Penalty block_penalty_dense(const Tensor& h, const Tensor& weight, const Tensor& bias, const Tensor& sign,
                            const OptionalTensor& z_ref, const OptionalTensor& h_ref, const OptionalTensor& mask,
                            const OptionalTensor& threshold, const OptionalTensor& margin, bool mean) {
  STD_TORCH_CHECK(z_ref.has_value() != h_ref.has_value(), "exactly one of z_ref and h_ref must be given");
  STD_TORCH_CHECK(h.dim() == 2, "h must be [T, d]");
  BlockPenaltyParams params{};
  OptionalTensor reference;
  if (h_ref) {
    check_matrix(*h_ref, "h_ref", h.size(0), h.size(1), h.scalar_type());
    check_device(*h_ref, "h_ref", h, "h");
    reference = with_contiguous_rows(*h_ref);
    params.h_ref = reference->const_data_ptr();
    params.h_ref_stride = reference->stride(0);
  } else {
    check_matrix(*z_ref, "z_ref", h.size(0), weight.size(0), ScalarType::Float);
    check_device(*z_ref, "z_ref", h, "h");
    reference = torch::stable::contiguous(*z_ref);
    params.z_ref = static_cast<const float*>(reference->const_data_ptr());
  }
  return penalise(params, h, weight, bias, sign, mask, threshold, margin, mean);
}

Penalty block_penalty_nf4(const Tensor& h, const Tensor& weight, const Tensor& bias, const Tensor& sign,
                          const Tensor& codes, const Tensor& absmax, const OptionalTensor& channels,
                          const OptionalTensor& outliers, const OptionalTensor& mask,
                          const OptionalTensor& threshold, const OptionalTensor& margin, bool mean,
                          int64_t blocksize) {
  STD_TORCH_CHECK(h.dim() == 2, "h must be [T, d]");
  check_matrix(codes, "codes", h.size(0), h.size(1) / 2, ScalarType::Byte);
  check_device(codes, "codes", h, "h");
  const Nf4Operand nf4 = nf4_operand(codes, absmax, channels, outliers, blocksize, h.scalar_type());
  BlockPenaltyParams params{};
  params.nf4 = nf4.rows;
  return penalise(params, h, weight, bias, sign, mask, threshold, margin, mean);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lockin_fast, CUDA, library) {
  if (asked_for("block_penalty")) library.impl("block_penalty", TORCH_BOX(&block_penalty_dense));
  if (asked_for("block_penalty_nf4")) library.impl("block_penalty_nf4", TORCH_BOX(&block_penalty_nf4));
}

}  // namespace lockin_fast
