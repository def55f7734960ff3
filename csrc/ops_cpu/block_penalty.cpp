#include "penalty.h"

namespace lockin_fast {
namespace {

std::tuple<Tensor, Tensor, Tensor> block_penalty(const Tensor& h, const Tensor& weight, const Tensor& bias,
                                                 const Tensor& sign, const OptionalTensor& z_ref,
                                                 const OptionalTensor& h_ref, const OptionalTensor& mask,
                                                 const OptionalTensor& threshold, const OptionalTensor& margin,
                                                 bool mean) {
  STD_TORCH_CHECK(z_ref.has_value() != h_ref.has_value(), "exactly one of z_ref and h_ref must be given");
  Penalty penalty = penalty_args(h, weight, bias, sign, mask, threshold, margin, mean);
  BlockPenaltyArgs& args = penalty.args;
  OptionalTensor reference;  // keeps what args points at alive
  if (h_ref) {
    reference = reference_rows(*h_ref, h);
    args.h_ref = reference->const_data_ptr();
    args.h_ref_stride = reference->stride(0);
  } else {
    check_matrix(*z_ref, "z_ref", h.size(0), weight.size(0));
    STD_TORCH_CHECK(z_ref->scalar_type() == ScalarType::Float, "z_ref must be float32");
    reference = torch::stable::contiguous(*z_ref);
    args.z_ref = static_cast<const float*>(reference->const_data_ptr());
  }
  static const auto kernel = LOCKIN_FAST_CHOOSE(block_penalty);
  return penalise(penalty, [&](int64_t begin, int64_t end, float* scratch) {
    return kernel(args, begin, end, scratch);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lockin_fast, CPU, library) {
  library.impl("block_penalty", TORCH_BOX(&block_penalty));
}

}  // namespace lockin_fast
