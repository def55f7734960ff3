// What the op wrappers share: argument checks, outputs, the sharing out of tokens, and the choice of a unit.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <new>
#include <optional>
#include <utility>

#include "../cpu/isa.h"
#include "../cpu/kernels.h"

namespace lockin_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The entry point of the unit that serves. Throws when LOCKIN_FAST_CPU_ISA asks for one that cannot.
#if defined(__x86_64__)
#define LOCKIN_FAST_CHOOSE(name) choose(&baseline::name, &avx2::name, &avx512::name, &avx512bf16::name)
template <class Kernel>
Kernel* choose(Kernel* baseline, Kernel* avx2, Kernel* avx512, Kernel* avx512bf16) {
  switch (chosen_isa()) {
    case Isa::avx2: return avx2;
    case Isa::avx512: return avx512;
    case Isa::avx512bf16: return avx512bf16;
    default: return baseline;
  }
}
#else
#define LOCKIN_FAST_CHOOSE(name) choose(&baseline::name)
template <class Kernel>
Kernel* choose(Kernel* baseline) {
  chosen_isa();
  return baseline;
}
#endif

inline Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::BFloat16: return Dtype::bf16;
    default: STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16");
  }
}

inline void check_matrix(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, " must have shape [", rows, ", ",
                  columns, "]");
}

inline void check_same_dtype(const Tensor& t, const char* name, const Tensor& other, const char* other_name) {
  STD_TORCH_CHECK(t.scalar_type() == other.scalar_type(), name, " must have the dtype of ", other_name);
}

// A matrix whose rows are contiguous; the row stride is free.
inline Tensor with_contiguous_rows(const Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

inline const float* float_vector(const OptionalTensor& t, const char* name, int64_t length) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->is_cpu() && t->scalar_type() == ScalarType::Float && t->dim() == 1 && t->size(0) == length &&
                      t->is_contiguous(),
                  name, " must be a contiguous float32 vector of ", length, " elements on the CPU");
  return static_cast<const float*>(t->const_data_ptr());
}

inline const int64_t* indices(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Long && t.dim() == 1 && t.is_contiguous(), name,
                  " must be a contiguous int64 vector on the CPU");
  return static_cast<const int64_t*>(t.const_data_ptr());
}

inline Tensor empty_floats(std::initializer_list<int64_t> shape) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), ScalarType::Float);
}

// Shares [0, tokens) out over torch's threads in whole tiles: body(begin, end).
template <class Body>
void for_token_tiles(int64_t tokens, const Body& body) {
  const int64_t tiles = (tokens + kTokenTile - 1) / kTokenTile;
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
    body(first * kTokenTile, std::min(last * kTokenTile, tokens));
  });
}

// Room for a packed weight, aligned to a cache line.
struct Room {
  explicit Room(int64_t bytes) : data(static_cast<char*>(::operator new(static_cast<size_t>(bytes), alignment))) {}
  Room(Room&& other) noexcept : data(std::exchange(other.data, nullptr)) {}
  ~Room() { ::operator delete(data, alignment); }
  static constexpr std::align_val_t alignment{64};
  char* data;
};

inline int64_t padded(int64_t width) { return (width + kWidthPadding - 1) / kWidthPadding * kWidthPadding; }

inline const bool* token_mask(const OptionalTensor& mask, int64_t tokens) {
  if (!mask) return nullptr;
  STD_TORCH_CHECK(mask->is_cpu() && mask->scalar_type() == ScalarType::Bool && mask->dim() == 1 &&
                      mask->size(0) == tokens && mask->is_contiguous(),
                  "mask must be a contiguous bool vector of ", tokens, " elements on the CPU");
  return static_cast<const bool*>(mask->const_data_ptr());
}

inline Tensor reference_rows(const Tensor& h_ref, const Tensor& h) {
  check_matrix(h_ref, "h_ref", h.size(0), h.size(1));
  check_same_dtype(h_ref, "h_ref", h, "h");
  return with_contiguous_rows(h_ref);
}

inline Tensor zeros(int64_t length, ScalarType dtype) {
  Tensor t = torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(&length, 1), dtype);
  return torch::stable::zero_(t);
}

}  // namespace lockin_fast
