#include "../cpu/block_penalty_nf4.h"

#include "nf4_rows.h"
#include "penalty.h"

namespace lockin_fast {
namespace {

std::tuple<Tensor, Tensor, Tensor> block_penalty_nf4(const Tensor& h, const Tensor& weight, const Tensor& bias,
                                                     const Tensor& sign, const Tensor& codes, const Tensor& absmax,
                                                     const OptionalTensor& channels, const OptionalTensor& outliers,
                                                     const OptionalTensor& mask, const OptionalTensor& threshold,
                                                     const OptionalTensor& margin, bool mean, int64_t blocksize) {
  Penalty penalty = penalty_args(h, weight, bias, sign, mask, threshold, margin, mean);
  const Nf4Operand reference = nf4_operand(codes, absmax, channels, outliers, blocksize, h.scalar_type());
  check_matrix(codes, "codes", h.size(0), h.size(1) / 2);
  const int64_t bytes = kNf4Tokens * h.size(1) * static_cast<int64_t>(h.element_size());
  static const auto kernel = LOCKIN_FAST_CHOOSE(block_penalty_nf4);
  return penalise(penalty, [&](int64_t begin, int64_t end, float* scratch) {
    const Room decoded(bytes);
    return kernel(penalty.args, reference.rows, begin, end, decoded.data, scratch);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lockin_fast, CPU, library) {
  library.impl("block_penalty_nf4", TORCH_BOX(&block_penalty_nf4));
}

}  // namespace lockin_fast
