#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace lockin_fast {
namespace {

constexpr const char* kVariable = "LOCKIN_FAST_CPU_ISA";
constexpr Isa kAll[] = {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512bf16};

// Read once: at load, or by whatever part of the library is initialised before this one.
const std::string& requested() {
  static const char* value = std::getenv(kVariable);
  static const std::string level = value ? value : "";
  return level;
}

[[maybe_unused]] const std::string& read_at_load = requested();

std::string joined(const std::vector<Isa>& isas) {
  std::string names;
  for (Isa isa : isas) names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  return names;
}

bool supported(Isa isa) {
  if (isa == Isa::baseline) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // Every processor with AVX2 has F16C too; these built-ins also ask whether the system saves the wide registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avx512) return avx512;
  return avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512bf16: return "avx512bf16";
    default: return "baseline";
  }
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> isas;
  for (Isa isa : kAll) {
    if (supported(isa)) isas.push_back(isa);
  }
  return isas;
}

Isa chosen_isa() {
  const std::vector<Isa> available = supported_isas();
  if (requested().empty()) return available.back();
  for (Isa isa : available) {
    if (requested() == isa_name(isa)) return isa;
  }
  throw std::runtime_error(std::string(kVariable) + "=" + requested() + " cannot be served; this processor runs: " +
                           joined(available) + ". Set one of these, or unset the variable.");
}

}  // namespace lockin_fast
