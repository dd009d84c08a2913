// Arguments with one number for each token, and sums over tokens whose bits do not depend on the number of threads.
#pragma once

#include "checks.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

namespace fastppo {

// (M,) of any floating dtype, as fp32.
struct Tokens {
  Tensor tensor;  // keeps the memory alive
  const float* data;
  float operator[](int64_t token) const { return data[token]; }
};

inline Tokens tokens_of(const Tensor& x, const char* name, int64_t count) {
  REQUIRE(is_floating(x.scalar_type()) || x.scalar_type() == ScalarType::Double, name, " has dtype ",
          name_of(x.scalar_type()), ", expected a floating one");
  require_shape(x, name, {count});
  const Tensor dense = torch::stable::contiguous(torch::stable::to(x, ScalarType::Float));
  return {dense, dense.const_data_ptr<float>()};
}

inline std::optional<Tokens> tokens_of(const std::optional<Tensor>& x, const char* name, int64_t count) {
  if (!x) return std::nullopt;
  return tokens_of(*x, name, count);
}

// (M,) bool, or None if no token is masked.
struct Mask {
  std::optional<Tensor> tensor;
  const bool* data;
  bool operator[](int64_t token) const { return !data || data[token]; }
};

inline Mask mask_of(const std::optional<Tensor>& x, int64_t count) {
  if (!x) return {std::nullopt, nullptr};
  require_dtype(*x, "mask", ScalarType::Bool);
  require_shape(*x, "mask", {count});
  const Tensor dense = torch::stable::contiguous(*x);
  return {dense, dense.const_data_ptr<bool>()};
}

// () fp32 or fp64: the divisor of a loss.
inline double normalizer_of(const Tensor& x) {
  require_shape(x, "normalizer", {});
  if (x.scalar_type() == ScalarType::Double) return *x.const_data_ptr<double>();
  require_dtype(x, "normalizer", ScalarType::Float);
  return *x.const_data_ptr<float>();
}

// (N,) fp32, or () for one number, on the device of `like`.
template <typename Numbers>
Tensor vector_of(const Numbers& numbers, const Tensor& like) {
  Tensor out = torch::stable::new_empty(like, {static_cast<int64_t>(numbers.size())}, ScalarType::Float);
  std::transform(numbers.begin(), numbers.end(), out.mutable_data_ptr<float>(),
                 [](double x) { return static_cast<float>(x); });
  return out;
}

inline Tensor scalar_of(double number, const Tensor& like) {
  Tensor out = torch::stable::new_empty(like, {}, ScalarType::Float);
  *out.mutable_data_ptr<float>() = static_cast<float>(number);
  return out;
}

// Sums over fixed blocks of tokens, added in order: `add(token, sums)` adds a token to the sums of its block, and
// `Sums` adds up by +=, from Sums{}.
template <typename Sums, typename F>
Sums sum_over_tokens(int64_t tokens, const F& add) {
  constexpr int64_t kTokens = 4096;
  std::vector<Sums> blocks((tokens + kTokens - 1) / kTokens);
  torch::stable::parallel_for(0, blocks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      Sums sums{};
      for (int64_t i = block * kTokens; i < std::min(tokens, (block + 1) * kTokens); ++i) add(i, sums);
      blocks[block] = sums;
    }
  });
  Sums total{};
  for (const Sums& sums : blocks) total += sums;
  return total;
}

}  // namespace fastppo
