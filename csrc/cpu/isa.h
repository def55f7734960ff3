// CPU instruction sets: what this processor has, and which compiled unit serves.
#pragma once

#include <string>
#include <vector>

namespace lockin_fast {

enum class Isa { baseline, avx2, avx512, avx512bf16 };

const char* isa_name(Isa isa);

// Every level this processor (and its operating system) can run, lowest first; baseline is always there.
std::vector<Isa> supported_isas();

// LOCKIN_FAST_CPU_ISA as it stood when the library was loaded, else the highest supported level.
// Throws std::runtime_error if the variable names no level, or one that the processor lacks.
Isa chosen_isa();

}  // namespace lockin_fast
