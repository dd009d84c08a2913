// The Python module fastppo._C: information on the build. The ops register themselves, each in its own file.
#include "simd.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>

#if defined(__clang__)
#define FASTPPO_COMPILER "clang++ "
#else
#define FASTPPO_COMPILER "g++ "
#endif

#ifndef FASTPPO_CUDA_ARCHS  // 80, 90, ... if setup.py links the CUDA sources
#define FASTPPO_CUDA_ARCHS
#endif

namespace py = pybind11;

namespace fastppo {
namespace {

const std::vector<std::pair<std::string, Simd>> kLevels = {
#if FASTPPO_X86
    {"avx512", Simd::avx512},
    {"avx2", Simd::avx2},
#endif
    {"baseline", Simd::baseline},
};

bool machine_has(Simd level) {
#if FASTPPO_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (level == Simd::avx2) return avx2;
  if (level == Simd::avx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return level == Simd::baseline;
}

std::atomic<Simd>& current() {
  static std::atomic<Simd> level{
      std::find_if(kLevels.begin(), kLevels.end(), [](const auto& l) { return machine_has(l.second); })->second};
  return level;
}

}  // namespace

Simd simd() { return current().load(std::memory_order_relaxed); }

std::string simd_name() {
  return std::find_if(kLevels.begin(), kLevels.end(), [](const auto& l) { return l.second == simd(); })->first;
}

std::vector<std::string> simd_compiled() {
  std::vector<std::string> names;
  for (const auto& level : kLevels) names.push_back(level.first);
  return names;
}

std::vector<std::string> cuda_archs() {
  std::vector<std::string> names;
  for (const int arch : std::vector<int>{FASTPPO_CUDA_ARCHS}) names.push_back("sm_" + std::to_string(arch));
  return names;
}

void set_simd(const std::string& name) {
  for (const auto& [known, level] : kLevels) {
    if (known != name) continue;
    if (!machine_has(level)) throw std::invalid_argument("SIMD level " + name + ": this machine does not have it");
    current().store(level);
    return;
  }
  throw std::invalid_argument("SIMD level " + name + " is not in this build; fastppo._C.built()['simd'] lists them");
}

}  // namespace fastppo

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of fastppo; importing it (after torch) registers torch.ops.fastppo.*";
  m.def(
      "built",
      [] {
        py::dict info;
        info["torch"] = TORCH_VERSION;
        info["compiler"] = FASTPPO_COMPILER __VERSION__;
        info["cuda_archs"] = py::tuple(py::cast(fastppo::cuda_archs()));
        info["simd"] = py::tuple(py::cast(fastppo::simd_compiled()));
        info["simd_used"] = fastppo::simd_name();
        return info;
      },
      "What this module was built with, and the SIMD level in use.");
  m.def("set_simd", &fastppo::set_simd, py::arg("level"), "Use another SIMD level; for tests and benchmarks.");
}
