// The SIMD levels that the CPU kernels are compiled for, and the one in use.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <string>
#include <vector>

// Each kernel body is compiled once for each level with `#pragma GCC target`, which only GCC has.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTPPO_X86 1
#include <immintrin.h>
#else
#define FASTPPO_X86 0
#endif

// For functions in an unrolled loop, which GCC would otherwise consider too large for inlining.
#define INLINE inline __attribute__((always_inline))

// The address of a function compiled by levels.inc, for the level in use.
#if FASTPPO_X86
#define AT_LEVEL(...)                                                  \
  (::fastppo::simd() == ::fastppo::Simd::avx512 ? &avx512::__VA_ARGS__ \
   : ::fastppo::simd() == ::fastppo::Simd::avx2 ? &avx2::__VA_ARGS__   \
                                                : &baseline::__VA_ARGS__)
#else
#define AT_LEVEL(...) (&baseline::__VA_ARGS__)
#endif

namespace fastppo {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

enum class Simd { baseline, avx2, avx512 };

// Names of the levels compiled in, best first.
std::vector<std::string> simd_compiled();

// The level in use: the best one that both the build and this machine support, unless `set_simd` set another.
Simd simd();
std::string simd_name();

// Throws std::invalid_argument for a level that is not compiled in or that this machine lacks.
void set_simd(const std::string& name);

}  // namespace fastppo
