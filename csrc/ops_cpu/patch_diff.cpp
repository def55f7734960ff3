#include "../cpu/patch_diff.h"

#include <memory>
#include <tuple>

#include "encode.h"

namespace lockin_fast {
namespace {

// The weight of `encode` in fp32, packed; `rows` holds it widened, `packed` what the products read.
struct Wide {
  Wide(const EncodeArgs& encode)
      : rows(encode.latents * encode.width * kFloat), packed(encode.latents * padded(encode.width) * kFloat) {
    static const auto widen = LOCKIN_FAST_CHOOSE(widen_rows);
    float* wide = reinterpret_cast<float*>(rows.data);
    torch::stable::parallel_for(0, encode.latents, 8,
                                [&](int64_t first, int64_t last) { widen(encode, first, last, wide); });
    args = encode;
    args.dtype = Dtype::f32;
    args.weight = wide;
    args.weight_stride = encode.width;
    args.packed = packed.data;
    pack_weight(args);
  }
  static constexpr int64_t kFloat = sizeof(float);
  Room rows, packed;
  EncodeArgs args;
};

std::tuple<Tensor, Tensor, Tensor> patch_diff(const Tensor& h, const Tensor& rows, const Tensor& source,
                                              const Tensor& weight, const OptionalTensor& bias,
                                              const OptionalTensor& threshold) {
  STD_TORCH_CHECK(h.dim() == 2 && weight.dim() == 2, "h must be [N, d] and weight [K, d]");
  const int64_t positions = rows.numel(), latents = weight.size(0);
  check_matrix(source, "source", positions, h.size(1));
  check_same_dtype(source, "source", h, "h");
  const Tensor from = with_contiguous_rows(source);
  Tensor norm = empty_floats({positions}), projection = empty_floats({positions, latents});
  Tensor change = bias ? empty_floats({positions, latents}) : empty_floats({0, 0});
  const Encode encode = bias ? packed_args(h, weight, bias, threshold, change) : encode_args(h, weight, bias, threshold, 0);
  const Wide wide(encode.args);

  PatchDiffArgs args{};
  args.wide = wide.args;
  args.encode = encode.args;
  args.rows = indices(rows, "rows");
  args.source = from.const_data_ptr();
  args.source_stride = from.stride(0);
  args.tokens = h.size(0);
  args.norm = static_cast<float*>(norm.mutable_data_ptr());
  args.projection = static_cast<float*>(projection.mutable_data_ptr());
  args.change = bias ? static_cast<float*>(change.mutable_data_ptr()) : nullptr;
  static const auto room_size = LOCKIN_FAST_CHOOSE(patch_diff_room);
  static const auto kernel = LOCKIN_FAST_CHOOSE(patch_diff);
  for_token_tiles(positions, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> room(new float[room_size(args.encode.width)]);
    kernel(args, begin, end, room.get());
  });
  return {norm, projection, change};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lockin_fast, CPU, library) {
  library.impl("patch_diff", TORCH_BOX(&patch_diff));
}

}  // namespace lockin_fast
