#include <tuple>

#include "latent_sums.h"

namespace lockin_fast {
namespace {

// Ascending, the last of them the number of tokens.
const int64_t* segment_ends(const Tensor& ends, int64_t tokens) {
  const int64_t* values = indices(ends, "ends");
  const int64_t segments = ends.size(0);
  STD_TORCH_CHECK(std::is_sorted(values, values + segments) && (segments == 0 || values[0] >= 0) &&
                      (segments > 0 ? values[segments - 1] : 0) == tokens,
                  "ends must ascend to the number of tokens, ", tokens);
  return values;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> segment_stats(const Tensor& h, const Tensor& weight, const Tensor& bias,
                                                         const OptionalTensor& h_ref, const OptionalTensor& threshold,
                                                         const Tensor& ends) {
  Wide wide = wide_args(h, weight, bias, h_ref, threshold, {});
  wide.args.ends = segment_ends(ends, h.size(0));
  const int64_t latents = weight.size(0), shape[] = {ends.size(0), latents};
  Tensor sums = torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape, 2), ScalarType::Double);
  torch::stable::zero_(sums);
  Tensor sum_squares = zeros(latents, ScalarType::Double), count = zeros(latents, ScalarType::Long);
  Tensor count_ref = zeros(h_ref ? latents : 0, ScalarType::Long);
  add_latent_sums(wide, latents, sums, sum_squares, count, count_ref);
  return {sums, sum_squares, count, count_ref};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lockin_fast, CPU, library) {
  if (wide_products_pay()) library.impl("segment_stats", TORCH_BOX(&segment_stats));
}

}  // namespace lockin_fast
