// fastppo::policy_loss and sum_tokens: PPO's clipped loss from log probabilities, and its sums, on the CPU.
#include "token_loss.h"
#include "tokens.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace fastppo {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> policy_loss(
    const Tensor& logprobs, const Tensor& old_logprobs, const Tensor& advantages, const std::optional<Tensor>& entropy,
    const std::optional<Tensor>& kl, const std::optional<Tensor>& mask, const Tensor& normalizer, double clip_low,
    double clip_high, std::optional<double> dual_clip, double entropy_coef, double kl_coef) {
  require_floating(logprobs, "logprobs");
  REQUIRE(logprobs.dim() == 1, "logprobs has shape ", shape(logprobs), ", expected (tokens,)");
  const int64_t count = logprobs.size(0);
  const Tokens logprob = tokens_of(logprobs, "logprobs", count);
  const Tokens old_logprob = tokens_of(old_logprobs, "old_logprobs", count);
  const Tokens advantage = tokens_of(advantages, "advantages", count);
  const std::optional<Tokens> entropies = tokens_of(entropy, "entropy", count), kls = tokens_of(kl, "kl", count);
  const Mask keep = mask_of(mask, count);
  const double divisor = normalizer_of(normalizer);
  const Clips clips = clips_of(clip_low, clip_high, dual_clip);

  Tensor d_logprobs = torch::stable::new_empty(logprobs, {count}, ScalarType::Float);
  float* const gradient = d_logprobs.mutable_data_ptr<float>();
  const auto total = sum_over_tokens<PolicySums>(count, [&](int64_t i, PolicySums& part) {
    gradient[i] = 0.0f;
    if (!keep[i]) return;
    const TokenLoss token = token_loss(logprob[i], old_logprob[i], advantage[i], clips);
    const std::array<double, 8> terms{token.loss,
                                      entropies ? (*entropies)[i] : 0.0,
                                      kls ? (*kls)[i] : 0.0,
                                      token.approximate_kl,
                                      static_cast<double>(token.clipped),
                                      static_cast<double>(token.dual_clipped),
                                      token.ratio,
                                      1.0};
    part += {terms, token.ratio};
    gradient[i] = static_cast<float>(token.d_logprob / divisor);
  });
  return {scalar_of(total.loss(entropy_coef, kl_coef) / divisor, logprobs), vector_of(total.sums, logprobs),
          scalar_of(total.ratio_max, logprobs), d_logprobs};
}

std::tuple<Tensor, Tensor, Tensor> sum_tokens(const Tensor& token_stats, double entropy_coef, double kl_coef,
                                              const Tensor& normalizer) {
  require_dtype(token_stats, "token_stats", ScalarType::Float);
  REQUIRE(token_stats.dim() == 2 && token_stats.size(0) == 8, "token_stats has shape ", shape(token_stats),
          ", expected (8, tokens)");
  const double divisor = normalizer_of(normalizer);
  const float* const data = token_stats.const_data_ptr<float>();
  const int64_t kind_stride = token_stats.stride(0), token_stride = token_stats.stride(1);
  const auto total = sum_over_tokens<PolicySums>(token_stats.size(1), [&](int64_t i, PolicySums& part) {
    for (int64_t kind = 0; kind < 8; ++kind) part.sums[kind] += data[kind * kind_stride + i * token_stride];
    part.add_ratio(data[6 * kind_stride + i * token_stride]);
  });
  return {scalar_of(total.loss(entropy_coef, kl_coef) / divisor, token_stats), vector_of(total.sums, token_stats),
          scalar_of(total.ratio_max, token_stats)};
}

}  // namespace
}  // namespace fastppo

// policy_loss: logprobs, old_logprobs, advantages, entropy, kl (M,) floating, fp64 only beside others; mask (M,) bool,
// False excludes a token; normalizer () fp32. Returns, fp32: loss () = (sums[0] - entropy_coef sums[1] + kl_coef
// sums[2]) / normalizer; sums (8,) over the unmasked tokens of the policy loss, entropy, KL to the reference,
// approximate KL, clipped, dual-clipped, ratio, 1; the largest ratio (); d loss / d logprobs (M,).
// sum_tokens: the same from the token_stats (8, M) fp32 of policy_loss_in_chunk. Sums are fp64, in fixed order.
STABLE_TORCH_LIBRARY_FRAGMENT(fastppo, m) {
  m.def(
      "policy_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor? entropy, Tensor? kl, Tensor? mask, "
      "Tensor normalizer, float clip_low, float clip_high, float? dual_clip, float entropy_coef, float kl_coef)"
      " -> (Tensor loss, Tensor sums, Tensor ratio_max, Tensor d_logprobs)");
  m.def(
      "sum_tokens(Tensor token_stats, float entropy_coef, float kl_coef, Tensor normalizer)"
      " -> (Tensor loss, Tensor sums, Tensor ratio_max)");
}

STABLE_TORCH_LIBRARY_IMPL(fastppo, CPU, m) {
  m.impl("policy_loss", TORCH_BOX(&fastppo::policy_loss));
  m.impl("sum_tokens", TORCH_BOX(&fastppo::sum_tokens));
}
