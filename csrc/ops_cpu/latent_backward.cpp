#include "../cpu/latent_backward.h"

#include <memory>

#include "../cpu/huge_pages.h"
#include "tensors.h"

namespace lockin_fast {
namespace {

void add_latent_gradient(const Tensor* grad, Tensor* out, const Tensor& coefficient, const Tensor& scale,
                         const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_cpu(), "weight must be a [K, d] tensor on the CPU");
  const int64_t tokens = coefficient.size(0), latents = weight.size(0), width = weight.size(1);
  check_matrix(coefficient, "coefficient", tokens, latents);
  STD_TORCH_CHECK(coefficient.scalar_type() == ScalarType::Float, "coefficient must be float32");
  const Dtype dtype = dtype_of(weight, "weight");
  const Tensor rows = torch::stable::contiguous(coefficient);
  const Tensor dense_weight = with_contiguous_rows(weight);
  static const auto pack_units = LOCKIN_FAST_CHOOSE(pack_panel_units);
  static const auto pack = LOCKIN_FAST_CHOOSE(pack_panels);
  static const auto kernel = LOCKIN_FAST_CHOOSE(latent_backward);

  LatentBackwardArgs args{};
  args.dtype = dtype;
  if (grad) {
    args.grad = grad->const_data_ptr();
    args.grad_stride = grad->stride(0);
  }
  args.out = out->mutable_data_ptr();
  args.out_stride = out->stride(0);
  args.coefficient = static_cast<const float*>(rows.const_data_ptr());
  args.scale = float_vector(scale, "scale", tokens);
  args.weight = dense_weight.const_data_ptr();
  args.weight_stride = dense_weight.stride(0);
  const Room panels(latents * padded(width) * static_cast<int64_t>(weight.element_size()));
  args.panels = panels.data;
  args.latents = latents;
  args.width = width;
  torch::stable::parallel_for(0, pack_units(args), 8, [&](int64_t first, int64_t last) { pack(args, first, last); });
  for_token_tiles(tokens, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> values(new float[2 * factor_room(latents)]);
    const std::unique_ptr<int32_t[]> indices(new int32_t[2 * factor_room(latents)]);
    kernel(args, begin, end, values.get(), indices.get());
  });
}

Tensor latent_backward(const Tensor& coefficient, const Tensor& scale, const Tensor& weight,
                       const OptionalTensor& grad) {
  STD_TORCH_CHECK(coefficient.dim() == 2 && weight.dim() == 2, "coefficient must be [T, K] and weight [K, d]");
  const int64_t shape[] = {coefficient.size(0), weight.size(1)};
  Tensor out =
      torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape, 2), weight.scalar_type());
  advise_huge_pages(out.mutable_data_ptr(), shape[0] * shape[1] * static_cast<int64_t>(weight.element_size()));
  OptionalTensor rows;
  if (grad) {
    check_matrix(*grad, "grad", shape[0], shape[1]);
    check_same_dtype(*grad, "grad", weight, "weight");
    rows = with_contiguous_rows(*grad);
  }
  add_latent_gradient(rows ? &*rows : nullptr, &out, coefficient, scale, weight);
  return out;
}

void latent_backward_(Tensor& grad, const Tensor& coefficient, const Tensor& scale, const Tensor& weight) {
  STD_TORCH_CHECK(coefficient.dim() == 2 && weight.dim() == 2, "coefficient must be [T, K] and weight [K, d]");
  check_matrix(grad, "grad", coefficient.size(0), weight.size(1));
  check_same_dtype(grad, "grad", weight, "weight");
  STD_TORCH_CHECK(grad.size(1) <= 1 || grad.stride(1) == 1, "grad must have contiguous rows to be updated in place");
  add_latent_gradient(&grad, &grad, coefficient, scale, weight);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lockin_fast, CPU, library) {
  library.impl("latent_backward", TORCH_BOX(&latent_backward));
  library.impl("latent_backward_", TORCH_BOX(&latent_backward_));
}

}  // namespace lockin_fast
