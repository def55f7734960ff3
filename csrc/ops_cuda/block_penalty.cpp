#include "../cuda/block_penalty.h"

#include <tuple>

#include "tensors.h"

namespace lockin_fast {
namespace {

using Penalty = std::tuple<Tensor, Tensor, Tensor>;

Tensor empty_like_rows(const Tensor& h, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(h, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype);
}

const float* latent_vector(const OptionalTensor& t, const char* name, const Tensor& weight) {
  if (!t) return nullptr;
  check_vector(*t, name, weight.size(0), ScalarType::Float);
  check_device(*t, name, weight, "weight");
  return static_cast<const float*>(t->const_data_ptr());
}

Dtype dtype_of(const Tensor& t) {
  if (t.scalar_type() == ScalarType::Float) return Dtype::f32;
  return t.scalar_type() == ScalarType::Half ? Dtype::f16 : Dtype::bf16;
}

// Runs the kernel once `params` holds the reference; the tensors that it points at are the caller's to keep.
Penalty penalise(BlockPenaltyParams params, const Tensor& h, const Tensor& weight, const Tensor& bias,
                 const Tensor& sign, const OptionalTensor& mask, const OptionalTensor& threshold,
                 const OptionalTensor& margin, bool mean) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight must be [K, d]");
  check_matrix(weight, "weight", weight.size(0), h.size(1), h.scalar_type());
  check_device(weight, "weight", h, "h");
  const int64_t tokens = h.size(0), latents = weight.size(0);
  const Tensor rows = with_contiguous_rows(h), latent_rows = with_contiguous_rows(weight);
  Tensor per_token = empty_like_rows(h, {tokens}, ScalarType::Float);
  Tensor coefficient = empty_like_rows(h, {tokens, latents}, ScalarType::Float);
  Tensor active = empty_like_rows(h, {}, ScalarType::Long);
  torch::stable::zero_(active);
  if (latents == 0) torch::stable::zero_(per_token);

  params.dtype = dtype_of(h);
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

void check_hidden(const Tensor& h) {
  STD_TORCH_CHECK(h.dim() == 2, "h must be [T, d]");
  check_float(h, "h");
}

Penalty block_penalty_dense(const Tensor& h, const Tensor& weight, const Tensor& bias, const Tensor& sign,
                            const OptionalTensor& z_ref, const OptionalTensor& h_ref, const OptionalTensor& mask,
                            const OptionalTensor& threshold, const OptionalTensor& margin, bool mean) {
  STD_TORCH_CHECK(z_ref.has_value() != h_ref.has_value(), "exactly one of z_ref and h_ref must be given");
  check_hidden(h);
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
  check_hidden(h);
  const int64_t tokens = h.size(0), width = h.size(1);
  STD_TORCH_CHECK(blocksize > 0 && width % blocksize == 0 && width % 2 == 0, "d must be even and a multiple of blocksize");
  check_matrix(codes, "codes", tokens, width / 2, ScalarType::Byte);
  check_device(codes, "codes", h, "h");
  check_matrix(absmax, "absmax", tokens, width / blocksize, ScalarType::Float);
  check_device(absmax, "absmax", h, "h");
  const Tensor packed = torch::stable::contiguous(codes), scales = torch::stable::contiguous(absmax);
  BlockPenaltyParams params{};
  params.nf4.codes = static_cast<const uint8_t*>(packed.const_data_ptr());
  params.nf4.absmax = static_cast<const float*>(scales.const_data_ptr());
  params.nf4.blocksize = blocksize;
  OptionalTensor kept;
  if (channels) {
    STD_TORCH_CHECK(outliers, "outliers must be given with channels");
    check_vector(*channels, "channels", channels->size(0), ScalarType::Int);
    check_device(*channels, "channels", h, "h");
    check_matrix(*outliers, "outliers", tokens, channels->size(0), h.scalar_type());
    check_device(*outliers, "outliers", h, "h");
    kept = torch::stable::contiguous(*outliers);
    params.nf4.channels = static_cast<const int32_t*>(channels->const_data_ptr());
    params.nf4.outliers = kept->const_data_ptr();
    params.nf4.outlier_count = channels->size(0);
  }
  return penalise(params, h, weight, bias, sign, mask, threshold, margin, mean);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lockin_fast, CUDA, library) {
  if (asked_for("block_penalty")) library.impl("block_penalty", TORCH_BOX(&block_penalty_dense));
  if (asked_for("block_penalty_nf4")) library.impl("block_penalty_nf4", TORCH_BOX(&block_penalty_nf4));
}

}  // namespace lockin_fast
