// lockin_fast._native: what is not a tensor op. Build information, CPU features, and the scalar maths of common/.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "common/half.h"
#include "common/nf4.h"
#include "common/penalty.h"
#include "cpu/isa.h"

namespace py = pybind11;

namespace {

constexpr float kNoThreshold = -std::numeric_limits<float>::infinity();

std::vector<std::string> cpu_features() {
  std::vector<std::string> names;
  for (lockin_fast::Isa isa : lockin_fast::supported_isas()) names.emplace_back(lockin_fast::isa_name(isa));
  return names;
}

py::dict build_info() {
  py::dict info;
  info["version"] = LOCKIN_FAST_VERSION;
  info["compiler"] = LOCKIN_FAST_COMPILER;
  info["build_type"] = LOCKIN_FAST_BUILD_TYPE;
  info["torch"] = LOCKIN_FAST_TORCH;
  info["units"] = LOCKIN_FAST_UNITS;
  info["cuda"] = LOCKIN_FAST_CUDA;
  return info;
}

template <class T>
float round_trip(float x) {
  T stored;
  lockin_fast::from_float(x, &stored);
  return lockin_fast::to_float(stored);
}

py::bytes nf4_block(const std::vector<float>& block, float* absmax) {
  uint32_t largest = 0;
  for (float x : block) largest = std::max(largest, lockin_fast::magnitude_bits(x));
  *absmax = lockin_fast::float_from_bits(largest);
  const float inverse = lockin_fast::nf4_inverse(*absmax);
  std::string codes;
  for (size_t i = 0; i + 1 < block.size(); i += 2) {
    codes += static_cast<char>(lockin_fast::nf4_pack(lockin_fast::nf4_code(block[i] * inverse),
                                                     lockin_fast::nf4_code(block[i + 1] * inverse)));
  }
  return codes;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Build information, CPU features and the scalar maths shared by the kernels.";
  m.def("build_info", &build_info, "Version, compiler, build type, torch headers, compiled units and CUDA chips, as strings.");
  m.def("cpu_features", &cpu_features, "The instruction-set levels this processor runs, lowest first.");
  m.def("isa", [] { return std::string(lockin_fast::isa_name(lockin_fast::chosen_isa())); },
        "The level that serves: LOCKIN_FAST_CPU_ISA if set, else the highest. RuntimeError if it cannot be served.");
  m.def("activation", &lockin_fast::activation<float>, py::arg("pre"), py::arg("threshold") = kNoThreshold,
        "relu(pre) where pre > threshold, else 0; NaN stays NaN. fp32.");
  m.def(
      "latent_penalty",
      [](float pre, float z_ref, float sign, float margin, float threshold) {
        const lockin_fast::LatentPenalty p = lockin_fast::latent_penalty(pre, z_ref, sign, margin, threshold);
        return py::make_tuple(p.value, p.coefficient, p.active);
      },
      py::arg("pre"), py::arg("z_ref"), py::arg("sign"), py::arg("margin") = 0.0f, py::arg("threshold") = kNoThreshold,
      "(e^2, d e^2 / d pre, e > 0) of one latent on one token, with e = relu(sign * (z - z_ref) - margin). fp32.");
  m.def("nf4_value", &lockin_fast::nf4_value, py::arg("code"), "The codebook's value of a code in [0, 16).");
  m.def("nf4_boundary", &lockin_fast::nf4_boundary, py::arg("i"), "Where code i ends and code i + 1 begins.");
  m.def("nf4_code", &lockin_fast::nf4_code, py::arg("x"), "The code nearest to x in [-1, 1]; 15 for NaN.");
  m.def(
      "nf4_block",
      [](const std::vector<float>& block) {
        float absmax;
        const py::bytes codes = nf4_block(block, &absmax);
        return py::make_tuple(codes, absmax);
      },
      py::arg("block"), "(codes, absmax) of one block of elements: two codes a byte, the even one in the high nibble.");
  m.def("round_bf16", &round_trip<lockin_fast::bf16>, py::arg("x"), "x rounded to bfloat16 and widened again.");
  m.def("round_f16", &round_trip<lockin_fast::f16>, py::arg("x"), "x rounded to float16 and widened again.");
}
