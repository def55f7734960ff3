// Registration of the CPU kernels under torch's stable ABI: argument checks, outputs, and the sharing out of tokens.
// The schemas are defined in Python (lockin_fast/ops).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "cpu/huge_pages.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/unit.h"

namespace lockin_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

#define LOCKIN_FAST_KERNELS(unit)                                                                         \
  Kernels {                                                                                               \
    unit::pack_units, unit::pack, unit::encode_latents, unit::block_penalty, unit::pack_panel_units,      \
        unit::pack_panels, unit::latent_backward, unit::stats_blocks, unit::latent_stats                  \
  }

Kernels kernels_of(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2: return LOCKIN_FAST_KERNELS(avx2);
    case Isa::avx512: return LOCKIN_FAST_KERNELS(avx512);
    case Isa::avx512bf16: return LOCKIN_FAST_KERNELS(avx512bf16);
#endif
    default: return LOCKIN_FAST_KERNELS(baseline);
  }
}

const Kernels& kernels() {
  static const Kernels chosen = kernels_of(chosen_isa());
  return chosen;
}

Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::BFloat16: return Dtype::bf16;
    default: STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16");
  }
}

void check_matrix(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, " must have shape [", rows, ", ",
                  columns, "]");
}

void check_same_dtype(const Tensor& t, const char* name, const Tensor& other, const char* other_name) {
  STD_TORCH_CHECK(t.scalar_type() == other.scalar_type(), name, " must have the dtype of ", other_name);
}

// A matrix whose rows are contiguous; the row stride is free.
Tensor with_contiguous_rows(const Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

const float* float_vector(const OptionalTensor& t, const char* name, int64_t length) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->is_cpu() && t->scalar_type() == ScalarType::Float && t->dim() == 1 && t->size(0) == length &&
                      t->is_contiguous(),
                  name, " must be a contiguous float32 vector of ", length, " elements on the CPU");
  return static_cast<const float*>(t->const_data_ptr());
}

Tensor empty_floats(std::initializer_list<int64_t> shape) {
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

int64_t padded(int64_t width) { return (width + kWidthPadding - 1) / kWidthPadding * kWidthPadding; }

// Keeps what EncodeArgs points at alive.
struct Encode {
  Tensor h, weight;
  Room room;
  EncodeArgs args;
};

Encode encode_args(const Tensor& h, const Tensor& weight, const Tensor& bias, const OptionalTensor& threshold,
                   int64_t packed_rows) {
  STD_TORCH_CHECK(h.is_cpu(), "h must be on the CPU");
  const int64_t latents = weight.size(0);
  check_matrix(weight, "weight", latents, h.size(1));
  check_same_dtype(weight, "weight", h, "h");
  Room room(packed_rows * padded(h.size(1)) * static_cast<int64_t>(h.element_size()));
  Encode encode{with_contiguous_rows(h), with_contiguous_rows(weight), std::move(room), {}};
  encode.args = {dtype_of(h, "h"),
                 encode.h.const_data_ptr(),
                 encode.h.stride(0),
                 encode.weight.const_data_ptr(),
                 encode.weight.stride(0),
                 float_vector(bias, "bias", latents),
                 float_vector(threshold, "threshold", latents),
                 latents,
                 h.size(1),
                 encode.room.data,
                 nullptr};
  return encode;
}

// As encode_args for a few latents: the weight packed, results to `out`.
Encode packed_args(const Tensor& h, const Tensor& weight, const Tensor& bias, const OptionalTensor& threshold,
                   const Tensor& out) {
  Encode encode = encode_args(h, weight, bias, threshold, weight.size(0));
  encode.args.out = static_cast<float*>(out.mutable_data_ptr());
  const Kernels& kernel = kernels();
  torch::stable::parallel_for(0, kernel.pack_units(encode.args), 8,
                              [&](int64_t first, int64_t last) { kernel.pack(encode.args, first, last); });
  return encode;
}

const bool* token_mask(const OptionalTensor& mask, int64_t tokens) {
  if (!mask) return nullptr;
  STD_TORCH_CHECK(mask->is_cpu() && mask->scalar_type() == ScalarType::Bool && mask->dim() == 1 &&
                      mask->size(0) == tokens && mask->is_contiguous(),
                  "mask must be a contiguous bool vector of ", tokens, " elements on the CPU");
  return static_cast<const bool*>(mask->const_data_ptr());
}

Tensor reference_rows(const Tensor& h_ref, const Tensor& h) {
  check_matrix(h_ref, "h_ref", h.size(0), h.size(1));
  check_same_dtype(h_ref, "h_ref", h, "h");
  return with_contiguous_rows(h_ref);
}

Tensor encode_latents(const Tensor& h, const Tensor& weight, const Tensor& bias, const OptionalTensor& threshold) {
  STD_TORCH_CHECK(h.dim() == 2 && weight.dim() == 2, "h must be [T, d] and weight [K, d]");
  Tensor out = empty_floats({h.size(0), weight.size(0)});
  const Encode encode = packed_args(h, weight, bias, threshold, out);
  const Kernels& kernel = kernels();
  for_token_tiles(h.size(0), [&](int64_t begin, int64_t end) { kernel.encode_latents(encode.args, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> block_penalty(const Tensor& h, const Tensor& weight, const Tensor& bias,
                                                 const Tensor& sign, const OptionalTensor& z_ref,
                                                 const OptionalTensor& h_ref, const OptionalTensor& mask,
                                                 const OptionalTensor& threshold, const OptionalTensor& margin,
                                                 bool mean) {
  STD_TORCH_CHECK(h.dim() == 2 && weight.dim() == 2, "h must be [T, d] and weight [K, d]");
  STD_TORCH_CHECK(z_ref.has_value() != h_ref.has_value(), "exactly one of z_ref and h_ref must be given");
  const int64_t tokens = h.size(0), latents = weight.size(0);
  Tensor per_token = empty_floats({tokens});
  Tensor coefficient = empty_floats({tokens, latents});
  Tensor active = torch::stable::empty({}, ScalarType::Long);
  const Encode encode = packed_args(h, weight, bias, threshold, coefficient);

  BlockPenaltyArgs args{};
  args.encode = encode.args;
  OptionalTensor reference;  // keeps what args points at alive
  if (h_ref) {
    reference = reference_rows(*h_ref, h);
    args.h_ref = reference->const_data_ptr();
    args.h_ref_stride = reference->stride(0);
  } else {
    check_matrix(*z_ref, "z_ref", tokens, latents);
    STD_TORCH_CHECK(z_ref->scalar_type() == ScalarType::Float, "z_ref must be float32");
    reference = torch::stable::contiguous(*z_ref);
    args.z_ref = static_cast<const float*>(reference->const_data_ptr());
  }
  args.mask = token_mask(mask, tokens);
  args.sign = float_vector(sign, "sign", latents);
  args.margin = float_vector(margin, "margin", latents);
  args.unit = mean && latents > 0 ? 1.0f / static_cast<float>(latents) : 1.0f;
  args.per_token = static_cast<float*>(per_token.mutable_data_ptr());

  const Kernels& kernel = kernels();
  std::atomic<int64_t> pairs{0};
  for_token_tiles(tokens, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[kPenaltyScratch * latents]);
    pairs += kernel.block_penalty(args, begin, end, scratch.get());
  });
  *static_cast<int64_t*>(active.mutable_data_ptr()) = pairs;
  return {per_token, coefficient, active};
}

void add_latent_gradient(const Tensor* grad, Tensor* out, const Tensor& coefficient, const Tensor& scale,
                         const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_cpu(), "weight must be a [K, d] tensor on the CPU");
  const int64_t tokens = coefficient.size(0), latents = weight.size(0), width = weight.size(1);
  check_matrix(coefficient, "coefficient", tokens, latents);
  STD_TORCH_CHECK(coefficient.scalar_type() == ScalarType::Float, "coefficient must be float32");
  const Dtype dtype = dtype_of(weight, "weight");
  const Tensor rows = torch::stable::contiguous(coefficient);
  const Tensor dense_weight = with_contiguous_rows(weight);
  const Kernels& kernel = kernels();

  LatentBackwardArgs args{};
  args.dtype = dtype;
  if (grad) {
    args.grad = grad->const_data_ptr();
    args.grad_stride = grad->stride(0);
  }
  args.out = out->mutable_data_ptr();
  args.out_stride = out->stride(0);
  args.coefficient = static_cast<const float*>(rows.const_data_ptr());
  args.scale = float_vector(scale, "scale", tokens);
  args.weight = dense_weight.const_data_ptr();
  args.weight_stride = dense_weight.stride(0);
  const Room panels(latents * padded(width) * static_cast<int64_t>(sizeof(float)));
  args.panels = reinterpret_cast<float*>(panels.data);
  args.latents = latents;
  args.width = width;
  torch::stable::parallel_for(0, kernel.pack_panel_units(args), 8,
                              [&](int64_t first, int64_t last) { kernel.pack_panels(args, first, last); });
  for_token_tiles(tokens, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> values(new float[2 * kTokenTile * latents]);
    const std::unique_ptr<int32_t[]> indices(new int32_t[2 * kTokenTile * latents]);
    kernel.latent_backward(args, begin, end, values.get(), indices.get());
  });
}

Tensor latent_backward(const Tensor& coefficient, const Tensor& scale, const Tensor& weight,
                       const OptionalTensor& grad) {
  STD_TORCH_CHECK(coefficient.dim() == 2 && weight.dim() == 2, "coefficient must be [T, K] and weight [K, d]");
  const int64_t shape[] = {coefficient.size(0), weight.size(1)};
  Tensor out =
      torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape, 2), weight.scalar_type());
  advise_huge_pages(out.mutable_data_ptr(), shape[0] * shape[1] * static_cast<int64_t>(weight.element_size()));
  OptionalTensor rows;
  if (grad) {
    check_matrix(*grad, "grad", shape[0], shape[1]);
    check_same_dtype(*grad, "grad", weight, "weight");
    rows = with_contiguous_rows(*grad);
  }
  add_latent_gradient(rows ? &*rows : nullptr, &out, coefficient, scale, weight);
  return out;
}

void latent_backward_(Tensor& grad, const Tensor& coefficient, const Tensor& scale, const Tensor& weight) {
  STD_TORCH_CHECK(coefficient.dim() == 2 && weight.dim() == 2, "coefficient must be [T, K] and weight [K, d]");
  check_matrix(grad, "grad", coefficient.size(0), weight.size(1));
  check_same_dtype(grad, "grad", weight, "weight");
  STD_TORCH_CHECK(grad.size(1) <= 1 || grad.stride(1) == 1, "grad must have contiguous rows to be updated in place");
  add_latent_gradient(&grad, &grad, coefficient, scale, weight);
}

Tensor zeros(int64_t length, ScalarType dtype) {
  Tensor t = torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(&length, 1), dtype);
  return torch::stable::zero_(t);
}

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

  const Kernels& kernel = kernels();
  const int64_t block_bytes = kStatsBlock * padded(h.size(1)) * static_cast<int64_t>(h.element_size());
  torch::stable::parallel_for(0, kernel.stats_blocks(args), 1, [&](int64_t first, int64_t last) {
    const Room packed(block_bytes);
    kernel.latent_stats(args, first, last, packed.data);
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
  library.impl("encode_latents", TORCH_BOX(&encode_latents));
  library.impl("block_penalty", TORCH_BOX(&block_penalty));
  library.impl("latent_backward", TORCH_BOX(&latent_backward));
  library.impl("latent_backward_", TORCH_BOX(&latent_backward_));
  if (wide_products_pay()) library.impl("latent_stats", TORCH_BOX(&latent_stats));
}

}  // namespace lockin_fast
