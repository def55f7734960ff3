#include "../cpu/latent_stats.h"

#include <stdexcept>
#include <tuple>

#include "encode.h"

namespace lockin_fast {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> latent_stats(const Tensor& h, const Tensor& weight,
                                                                const Tensor& bias, const OptionalTensor& h_ref,
                                                                const OptionalTensor& threshold,
                                                                const OptionalTensor& mask) {
  STD_TORCH_CHECK(h.dim() == 2 && weight.dim() == 2, "h must be [T, d] and weight [F, d]");
  const int64_t tokens = h.size(0), latents = weight.size(0);
  const Encode encode = encode_args(h, weight, bias, threshold, 0);
  Tensor sum = zeros(latents, ScalarType::Double), sum_squares = zeros(latents, ScalarType::Double);
  Tensor count = zeros(latents, ScalarType::Long), count_ref = zeros(h_ref ? latents : 0, ScalarType::Long);
  Tensor total = torch::stable::empty({}, ScalarType::Long);

  LatentStatsArgs args{};
  args.encode = encode.args;
  OptionalTensor reference;  // keeps what args points at alive
  if (h_ref) {
    reference = reference_rows(*h_ref, h);
    args.h_ref = reference->const_data_ptr();
    args.h_ref_stride = reference->stride(0);
    args.count_ref = static_cast<int64_t*>(count_ref.mutable_data_ptr());
  }
  args.mask = token_mask(mask, tokens);
  args.tokens = tokens;
  args.sum = static_cast<double*>(sum.mutable_data_ptr());
  args.sum_squares = static_cast<double*>(sum_squares.mutable_data_ptr());
  args.count = static_cast<int64_t*>(count.mutable_data_ptr());

  static const auto blocks = LOCKIN_FAST_CHOOSE(stats_blocks);
  static const auto kernel = LOCKIN_FAST_CHOOSE(latent_stats);
  const int64_t block_bytes = kStatsBlock * padded(h.size(1)) * static_cast<int64_t>(h.element_size());
  torch::stable::parallel_for(0, blocks(args), 1, [&](int64_t first, int64_t last) {
    const Room packed(block_bytes);
    kernel(args, first, last, packed.data);
  });
  *static_cast<int64_t*>(total.mutable_data_ptr()) = args.mask ? std::count(args.mask, args.mask + tokens, true) : tokens;
  return {sum, sum_squares, count, count_ref, total};
}

// Full-width products: below AVX-512 torch's own, tile by tile, are as fast or faster, so they stay the kernel there.
// A level that cannot be served is reported by the first op that is called; nothing may throw while a library loads.
bool wide_products_pay() {
  try {
    return chosen_isa() >= Isa::avx512;
  } catch (const std::runtime_error&) {
    return false;
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lockin_fast, CPU, library) {
  if (wide_products_pay()) library.impl("latent_stats", TORCH_BOX(&latent_stats));
}

}  // namespace lockin_fast
