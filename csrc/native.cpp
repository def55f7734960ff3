// lockin_fast._native: what is not a tensor op. Build information, CPU features, and the scalar maths of common/.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <string>
#include <vector>

#include "common/half.h"
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
  return info;
}

template <class T>
float round_trip(float x) {
  T stored;
  lockin_fast::from_float(x, &stored);
  return lockin_fast::to_float(stored);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Build information, CPU features and the scalar maths shared by the kernels.";
  m.def("build_info", &build_info, "Version, compiler, build type, torch headers and compiled units, as strings.");
  m.def("cpu_features", &cpu_features, "The instruction-set levels this processor runs, lowest first.");
  m.def("isa", [] { return std::string(lockin_fast::isa_name(lockin_fast::chosen_isa())); },
        "The level that serves: LOCKIN_FAST_CPU_ISA if set, else the highest. RuntimeError if it cannot be served.");
  m.def("activation", &lockin_fast::activation, py::arg("pre"), py::arg("threshold") = kNoThreshold,
        "relu(pre) where pre > threshold, else 0; NaN stays NaN. fp32.");
  m.def(
      "latent_penalty",
      [](float pre, float z_ref, float sign, float margin, float threshold) {
        const lockin_fast::LatentPenalty p = lockin_fast::latent_penalty(pre, z_ref, sign, margin, threshold);
        return py::make_tuple(p.value, p.coefficient, p.active);
      },
      py::arg("pre"), py::arg("z_ref"), py::arg("sign"), py::arg("margin") = 0.0f, py::arg("threshold") = kNoThreshold,
      "(e^2, d e^2 / d pre, e > 0) of one latent on one token, with e = relu(sign * (z - z_ref) - margin). fp32.");
  m.def("round_bf16", &round_trip<lockin_fast::bf16>, py::arg("x"), "x rounded to bfloat16 and widened again.");
  m.def("round_f16", &round_trip<lockin_fast::f16>, py::arg("x"), "x rounded to float16 and widened again.");
}
