// PPO's loss of one token, with its gradient: Schulman et al. 2017, eq. 7; dual clip: Ye et al. 2020, eq. 5.
#pragma once

#include "checks.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>

namespace fastppo {

constexpr double kLogRatioMax = 20.0;  // e^20 = 4.9e8: far above any clip, and far from overflow

// e^x up to kLogRatioMax, above it its tangent, which is finite and has a gradient; less_tangent is value - 1 - x.
struct BoundedExp {
  double value, slope, less_tangent;
};

inline BoundedExp bounded_exp(double x) {
  if (x > kLogRatioMax) {
    const double slope = std::exp(kLogRatioMax), beyond = x - kLogRatioMax;
    return {slope + slope * beyond, slope, (slope - 1.0 - kLogRatioMax) + (slope - 1.0) * beyond};
  }
  const double e = std::exp(x);
  return {e, e, e - 1.0 - x};
}

struct Clips {
  double low, high;  // bounds of the ratio
  std::optional<double> dual;
};

inline Clips clips_of(double clip_low, double clip_high, std::optional<double> dual_clip) {
  REQUIRE(clip_low >= 0 && clip_low <= 1, "clip_low is ", clip_low, ", expected a number from 0 to 1");
  REQUIRE(clip_high >= 0, "clip_high is ", clip_high, ", expected 0 or more");
  REQUIRE(!dual_clip || *dual_clip > 1, "dual_clip is ", *dual_clip, ", expected a number above 1, or None");
  return {1.0 - clip_low, 1.0 + clip_high, dual_clip};
}

struct TokenLoss {
  double loss, approximate_kl, ratio;  // -J; k3 of old against new policy
  bool clipped, dual_clipped;
  double d_logprob;  // d loss / d logprob
};

inline TokenLoss token_loss(double logprob, double old_logprob, double advantage, const Clips& clips) {
  const BoundedExp bounded_ratio = bounded_exp(logprob - old_logprob);
  const double ratio = bounded_ratio.value;
  const double unclipped = ratio * advantage, bounded = std::clamp(ratio, clips.low, clips.high) * advantage;
  const bool clipped = bounded < unclipped;
  double objective = clipped ? bounded : unclipped;
  const bool dual_clipped = clips.dual && advantage < 0 && objective < *clips.dual * advantage;
  if (dual_clipped) objective = *clips.dual * advantage;
  const bool flat = clipped || dual_clipped;
  return {-objective,   bounded_ratio.less_tangent,
          ratio,        clipped,
          dual_clipped, flat ? 0.0 : -bounded_ratio.slope * advantage};
}

// Estimates of KL(policy || reference) from the sampled token, with d = logprob - ref_logprob (Schulman 2020).
struct KlEstimate {
  double value, d_logprob;
};

inline KlEstimate k2(double d) { return {d * d / 2, d}; }

inline KlEstimate k3(double d) {  // e^-d - 1 + d
  const BoundedExp inverse_ratio = bounded_exp(-d);
  return {inverse_ratio.less_tangent, 1.0 - inverse_ratio.slope};
}

// Sums over the losses of tokens: policy loss, entropy, KL to the reference, approximate KL (k3), clipped,
// dual-clipped, ratio, count; and the largest ratio, NaN if a ratio is NaN.
struct PolicySums {
  std::array<double, 8> sums{};
  double ratio_max = 0.0;

  void add_ratio(double ratio) {
    if (ratio > ratio_max || std::isnan(ratio)) ratio_max = ratio;
  }

  void operator+=(const PolicySums& other) {
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += other.sums[i];
    add_ratio(other.ratio_max);
  }

  // A term with coefficient 0 is left out: 0 times an infinite KL would be a NaN.
  double loss(double entropy_coef, double kl_coef) const {
    double total = sums[0];
    if (entropy_coef != 0.0) total -= entropy_coef * sums[1];
    if (kl_coef != 0.0) total += kl_coef * sums[2];
    return total;
  }
};

}  // namespace fastppo
