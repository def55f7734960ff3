#include "../cuda/latent_backward.h"

#include "tensors.h"

namespace lockin_fast {
namespace {

void add_latent_gradient(const Tensor* grad, Tensor* out, const Tensor& coefficient, const Tensor& scale,
                         const Tensor& weight) {
  const int64_t tokens = out->size(0), latents = weight.size(0);
  check_matrix(coefficient, "coefficient", tokens, latents, ScalarType::Float);
  check_device(coefficient, "coefficient", weight, "weight");
  check_vector(scale, "scale", tokens, ScalarType::Float);
  check_device(scale, "scale", weight, "weight");
  const Tensor factors = torch::stable::contiguous(coefficient), rows = with_contiguous_rows(weight);

  LatentBackwardParams params{};
  params.dtype = dtype_of(weight, "weight");
  if (grad) {
    params.grad = grad->const_data_ptr();
    params.grad_stride = grad->stride(0);
  }
  params.out = out->mutable_data_ptr();
  params.out_stride = out->stride(0);
  params.coefficient = static_cast<const float*>(factors.const_data_ptr());
  params.scale = static_cast<const float*>(scale.const_data_ptr());
  params.weight = rows.const_data_ptr();
  params.weight_stride = rows.stride(0);
  params.tokens = tokens;
  params.latents = latents;
  params.width = weight.size(1);
  run(latent_backward, params, weight);
}

void check_gradient(const Tensor& grad, const Tensor& coefficient, const Tensor& weight) {
  check_matrix(grad, "grad", coefficient.size(0), weight.size(1), weight.scalar_type());
  check_device(grad, "grad", weight, "weight");
}

Tensor latent_gradient(const Tensor& coefficient, const Tensor& scale, const Tensor& weight,
                       const OptionalTensor& grad) {
  STD_TORCH_CHECK(coefficient.dim() == 2 && weight.dim() == 2, "coefficient must be [T, K] and weight [K, d]");
  const int64_t shape[] = {coefficient.size(0), weight.size(1)};
  Tensor out = torch::stable::new_empty(weight, torch::headeronly::IntHeaderOnlyArrayRef(shape, 2));
  OptionalTensor rows;
  if (grad) {
    check_gradient(*grad, coefficient, weight);
    rows = with_contiguous_rows(*grad);
  }
  add_latent_gradient(rows ? &*rows : nullptr, &out, coefficient, scale, weight);
  return out;
}

void latent_gradient_in_place(Tensor& grad, const Tensor& coefficient, const Tensor& scale, const Tensor& weight) {
  STD_TORCH_CHECK(coefficient.dim() == 2 && weight.dim() == 2, "coefficient must be [T, K] and weight [K, d]");
  check_gradient(grad, coefficient, weight);
  STD_TORCH_CHECK(rows_are_contiguous(grad), "grad must have contiguous rows to be updated in place");
  add_latent_gradient(&grad, &grad, coefficient, scale, weight);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lockin_fast, CUDA, library) {
  if (asked_for("latent_backward")) library.impl("latent_backward", TORCH_BOX(&latent_gradient));
  if (asked_for("latent_backward_")) library.impl("latent_backward_", TORCH_BOX(&latent_gradient_in_place));
}

}  // namespace lockin_fast
