#include "../cpu/js_divergence.h"

#include <vector>

#include "tensors.h"

namespace lockin_fast {
namespace {

Tensor js_divergence(const Tensor& logits, const OptionalTensor& weights) {
  STD_TORCH_CHECK(logits.dim() == 3 && logits.is_cpu() && logits.size(0) > 0 && logits.size(2) > 0,
                  "logits must be [n, S, V] on the CPU, with n and V not 0");
  const Tensor rows = logits.size(2) == 1 || logits.stride(2) == 1 ? logits : torch::stable::contiguous(logits);
  Tensor bits = empty_floats({rows.size(1)});
  const std::vector<float> alike(static_cast<size_t>(rows.size(0)), 1.0f / static_cast<float>(rows.size(0)));

  JsDivergenceArgs args{};
  args.dtype = dtype_of(rows, "logits");
  args.logits = rows.const_data_ptr();
  args.prompt_stride = rows.stride(0);
  args.position_stride = rows.stride(1);
  args.prompts = rows.size(0);
  args.vocabulary = rows.size(2);
  args.weights = weights ? float_vector(weights, "weights", args.prompts) : alike.data();
  args.bits = static_cast<float*>(bits.mutable_data_ptr());

  static const auto room = LOCKIN_FAST_CHOOSE(js_divergence_room);
  static const auto kernel = LOCKIN_FAST_CHOOSE(js_divergence);
  torch::stable::parallel_for(0, rows.size(1), 1, [&](int64_t first, int64_t last) {
    const Room scratch(room(args));
    kernel(args, first, last, scratch.data);
  });
  return bits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lockin_fast, CPU, library) {
  library.impl("js_divergence", TORCH_BOX(&js_divergence));
}

}  // namespace lockin_fast
