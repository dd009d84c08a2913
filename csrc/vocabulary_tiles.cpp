// Compiles the loops of vocabulary_tiles.inc for every SIMD level, and selects them by dtype.
#include "vocabulary_tiles.h"

#include "simd.h"

namespace fastppo {
namespace {

using torch::headeronly::ScalarType;

#define BODY "vocabulary_tiles.inc"
#include "levels.inc"

template <typename T, typename R, bool Capped>
TileKernels kernels() {
  return {AT_LEVEL(read_tile<T, R, Capped>), AT_LEVEL(write_tile<T, R, Capped>), AT_LEVEL(cap_one<T, Capped>)};
}

template <typename T, typename R>
TileKernels kernels(bool capped) {
  return capped ? kernels<T, R, true>() : kernels<T, R, false>();
}

template <typename T>
TileKernels kernels(std::optional<ScalarType> ref, bool capped) {
  if (!ref) return kernels<T, void>(capped);
  if (*ref == ScalarType::Float) return kernels<T, float>(capped);
  if (*ref == ScalarType::Half) return kernels<T, Half>(capped);
  return kernels<T, BFloat16>(capped);
}

template <typename T, bool Truncated>
SamplerKernels samplers() {
  return {AT_LEVEL(sum_blocks<T, Truncated>), AT_LEVEL(exponentials<T, Truncated>), AT_LEVEL(widen_one<T>)};
}

template <typename T>
SamplerKernels samplers(bool truncated) {
  return truncated ? samplers<T, true>() : samplers<T, false>();
}

}  // namespace

TileKernels tile_kernels(ScalarType logits, std::optional<ScalarType> ref, bool capped) {
  if (logits == ScalarType::Float) return kernels<float>(ref, capped);
  if (logits == ScalarType::Half) return kernels<Half>(ref, capped);
  return kernels<BFloat16>(ref, capped);
}

SamplerKernels sampler_kernels(ScalarType logits, bool truncated) {
  if (logits == ScalarType::Float) return samplers<float>(truncated);
  if (logits == ScalarType::Half) return samplers<Half>(truncated);
  return samplers<BFloat16>(truncated);
}

}  // namespace fastppo
