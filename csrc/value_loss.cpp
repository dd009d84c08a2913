// fastppo::value_loss: the squared error of the critic, clipped around the old value, on the CPU.
#include "tokens.h"

#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>

namespace fastppo {
namespace {

struct ValueSums {
  std::array<double, 7> sums{};

  void operator+=(const ValueSums& other) {
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += other.sums[i];
  }
};

std::tuple<Tensor, Tensor, Tensor> value_loss(const Tensor& values, const Tensor& old_values, const Tensor& returns,
                                              const std::optional<Tensor>& mask, const Tensor& normalizer,
                                              std::optional<double> clip) {
  require_floating(values, "values");
  REQUIRE(values.dim() == 1, "values has shape ", shape(values), ", expected (tokens,)");
  REQUIRE(!clip || *clip > 0, "clip is ", *clip, ", expected a positive number, or None");
  const int64_t count = values.size(0);
  const Tokens value = tokens_of(values, "values", count), old_value = tokens_of(old_values, "old_values", count);
  const Tokens target = tokens_of(returns, "returns", count);
  const Mask keep = mask_of(mask, count);
  const double divisor = normalizer_of(normalizer);

  Tensor d_values = torch::stable::new_empty(values, {count}, ScalarType::Float);
  float* const gradient = d_values.mutable_data_ptr<float>();
  const auto total = sum_over_tokens<ValueSums>(count, [&](int64_t i, ValueSums& part) {
    gradient[i] = 0.0f;
    if (!keep[i]) return;
    const double v = value[i], old = old_value[i], r = target[i], error = (v - r) * (v - r);
    double loss = error, slope = v - r;
    bool clipped = false;
    if (clip) {
      const double bounded = old + std::clamp(v - old, -*clip, *clip) - r;
      clipped = bounded * bounded > error;
      if (clipped) {
        loss = bounded * bounded;
        slope = std::abs(v - old) <= *clip ? bounded : 0.0;
      }
    }
    part += {{0.5 * loss, static_cast<double>(clipped), v, v * v, r, r * r, error}};
    gradient[i] = static_cast<float>(slope / divisor);
  });
  return {scalar_of(total.sums[0] / divisor, values), vector_of(total.sums, values), d_values};
}

}  // namespace
}  // namespace fastppo

// values, old_values, returns (M,) floating, values not fp64; mask (M,) bool, False excludes a token; normalizer ()
// fp32. Returns, fp32: loss () = sums[0] / normalizer; sums (7,) over the unmasked tokens of half the squared error,
// clipped, V, V^2, R, R^2, (R - V)^2; d loss / d values (M,). Sums are fp64, in fixed order.
STABLE_TORCH_LIBRARY_FRAGMENT(fastppo, m) {
  m.def(
      "value_loss(Tensor values, Tensor old_values, Tensor returns, Tensor? mask, Tensor normalizer, float? clip)"
      " -> (Tensor loss, Tensor sums, Tensor d_values)");
}

STABLE_TORCH_LIBRARY_IMPL(fastppo, CPU, m) { m.impl("value_loss", TORCH_BOX(&fastppo::value_loss)); }
