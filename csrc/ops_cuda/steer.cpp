#include "../cuda/steer.h"

#include "tensors.h"

namespace lockin_fast {
namespace {

DirectionDtype direction_dtype(const Tensor& directions) {
  switch (directions.scalar_type()) {
    case ScalarType::Float: return DirectionDtype::f32;
    case ScalarType::Half: return DirectionDtype::f16;
    case ScalarType::BFloat16: return DirectionDtype::bf16;
    case ScalarType::Double: return DirectionDtype::f64;
    default: STD_TORCH_CHECK(false, "directions must be float32, float16, bfloat16 or float64");
  }
}

void steer_(Tensor& h, const Tensor& directions, const Tensor& index, const Tensor& coefficient) {
  STD_TORCH_CHECK(h.dim() == 2 || h.dim() == 3, "h must be [R, S, d] or [R, d]");
  const int64_t last = h.dim() - 1, width = h.size(last);
  STD_TORCH_CHECK(width <= 1 || h.stride(last) == 1, "h must have contiguous rows to be updated in place");
  check_matrix(directions, "directions", directions.size(0), width, directions.scalar_type());
  check_vector(index, "index", h.size(0), ScalarType::Long);
  check_vector(coefficient, "coefficient", h.size(0), ScalarType::Float);
  check_device(directions, "directions", h, "h");
  check_device(index, "index", h, "h");
  check_device(coefficient, "coefficient", h, "h");
  const Tensor rows = with_contiguous_rows(directions);

  SteerParams params{};
  params.dtype = dtype_of(h, "h");
  params.h = h.mutable_data_ptr();
  params.row_stride = h.stride(0);
  params.position_stride = last == 2 ? h.stride(1) : 0;
  params.direction_dtype = direction_dtype(directions);
  params.directions = rows.const_data_ptr();
  params.direction_stride = rows.stride(0);
  params.index = static_cast<const int64_t*>(index.const_data_ptr());
  params.coefficient = static_cast<const float*>(coefficient.const_data_ptr());
  params.rows = h.size(0);
  params.positions = last == 2 ? h.size(1) : 1;
  params.width = width;
  params.count = rows.size(0);
  run(steer, params, h);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lockin_fast, CUDA, library) {
  if (asked_for("steer_")) library.impl("steer_", TORCH_BOX(&steer_));
}

}  // namespace lockin_fast
