#include <tuple>

#include "latent_sums.h"

namespace lockin_fast {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> latent_stats(const Tensor& h, const Tensor& weight,
                                                                const Tensor& bias, const OptionalTensor& h_ref,
                                                                const OptionalTensor& threshold,
                                                                const OptionalTensor& mask) {
  const Wide wide = wide_args(h, weight, bias, h_ref, threshold, mask);
  const int64_t latents = weight.size(0);
  Tensor sum = zeros(latents, ScalarType::Double), sum_squares = zeros(latents, ScalarType::Double);
  Tensor count = zeros(latents, ScalarType::Long), count_ref = zeros(h_ref ? latents : 0, ScalarType::Long);
  add_latent_sums(wide, latents, sum, sum_squares, count, count_ref);
  const bool* kept = wide.args.mask;
  Tensor total = torch::stable::empty({}, ScalarType::Long);
  *static_cast<int64_t*>(total.mutable_data_ptr()) = kept ? std::count(kept, kept + h.size(0), true) : h.size(0);
  return {sum, sum_squares, count, count_ref, total};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lockin_fast, CPU, library) {
  if (wide_products_pay()) library.impl("latent_stats", TORCH_BOX(&latent_stats));
}

}  // namespace lockin_fast
