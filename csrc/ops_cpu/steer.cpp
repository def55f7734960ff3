#include "../cpu/steer.h"

#include <memory>

#include "tensors.h"

namespace lockin_fast {
namespace {

constexpr int64_t kElementsPerTask = int64_t{1} << 17;  // what is worth another thread

void steer_(Tensor& h, const Tensor& directions, const Tensor& index, const Tensor& coefficient) {
  STD_TORCH_CHECK(h.is_cpu() && (h.dim() == 2 || h.dim() == 3), "h must be [R, S, d] or [R, d] on the CPU");
  const int64_t last = h.dim() - 1;
  const int64_t rows = h.size(0), width = h.size(last);
  STD_TORCH_CHECK(width <= 1 || h.stride(last) == 1, "h must be contiguous along d to be written in place");
  STD_TORCH_CHECK(directions.dim() == 2 && index.numel() == rows, "directions must be [F, d] and index [R]");
  check_matrix(directions, "directions", directions.size(0), width);
  const Tensor dense = with_contiguous_rows(directions);

  SteerArgs args{};
  args.dtype = dtype_of(h, "h");
  args.h = h.mutable_data_ptr();
  args.row_stride = h.stride(0);
  args.stride = last == 2 ? h.stride(1) : 0;
  args.direction_dtype = dtype_of(directions, "directions");
  args.directions = dense.const_data_ptr();
  args.direction_stride = dense.stride(0);
  args.count = dense.size(0);
  args.index = indices(index, "index");
  args.coefficient = float_vector(coefficient, "coefficient", rows);
  args.positions = last == 2 ? h.size(1) : 1;
  args.width = width;
  if (width == 0) return;
  static const auto kernel = LOCKIN_FAST_CHOOSE(steer);
  const int64_t grain = (kElementsPerTask + width - 1) / width;
  torch::stable::parallel_for(0, rows * args.positions, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> room(new float[width]);
    kernel(args, begin, end, room.get());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lockin_fast, CPU, library) {
  library.impl("steer_", TORCH_BOX(&steer_));
}

}  // namespace lockin_fast
