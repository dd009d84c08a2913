// The SIMD levels that the CPU kernels are compiled for, and the one in use.
#pragma once

#include <string>
#include <vector>

// Each kernel body is compiled once a level through `#pragma GCC target`, which only GCC has.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTPPO_X86 1
#else
#define FASTPPO_X86 0
#endif

namespace fastppo {

enum class Simd { baseline, avx2, avx512 };

// Names of the levels compiled in, best first.
std::vector<std::string> simd_compiled();

// The level in use: the best one that both the build and this machine have, unless `set_simd` chose another.
Simd simd();
std::string simd_name();

// Throws std::invalid_argument for a level that is not compiled in or that this machine lacks.
void set_simd(const std::string& name);

}  // namespace fastppo
