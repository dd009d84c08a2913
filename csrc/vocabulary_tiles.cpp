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

template <typename T>
SamplerKernels samplers() {
  return {AT_LEVEL(sum_blocks<T>), AT_LEVEL(exponentials<T>), AT_LEVEL(widen_one<T>)};
}

}  // namespace

TileKernels tile_kernels(ScalarType logits, std::optional<ScalarType> ref, bool capped) {
  if (logits == ScalarType::Float) return kernels<float>(ref, capped);
  if (logits == ScalarType::Half) return kernels<Half>(ref, capped);
  return kernels<BFloat16>(ref, capped);
}

SamplerKernels sampler_kernels(ScalarType logits) {
  if (logits == ScalarType::Float) return samplers<float>();
  if (logits == ScalarType::Half) return samplers<Half>();
  return samplers<BFloat16>();
}

}  // namespace fastppo
