// fastppo::policy_loss_in_chunk: PPO's loss from a chunk of logits, which it overwrites by their gradient, on the CPU.
#include "token_loss.h"
#include "tokens.h"
#include "vocabulary_rows.h"

#include <torch/csrc/stable/library.h>

#include <array>
#include <cstring>
#include <string>

namespace fastppo {
namespace {

enum class KlKind { exact, k2, k3 };

KlKind kl_kind_of(const std::string& name) {
  REQUIRE(name == "exact" || name == "k2" || name == "k3", "kl_kind is '", name, "', expected 'exact', 'k2' or 'k3'");
  return name == "exact" ? KlKind::exact : name == "k2" ? KlKind::k2 : KlKind::k3;
}

struct Loss {
  Tokens old_logprobs, advantages;
  std::optional<Tokens> ref_logprobs;
  Mask keep;
  Clips clips;
  double entropy_coef, kl_coef, normalizer;
  KlKind kl_kind;
};

// The column of token_stats of a token, and the gradients of loss / normalizer by the statistics of its row.
struct Outcome {
  std::array<float, 8> stats;
  RowGradients gradients;
};

Outcome outcome_of(const Loss& loss, int64_t row, const RowStats& stats) {
  const TokenLoss token = token_loss(stats.logprob, loss.old_logprobs[row], loss.advantages[row], loss.clips);
  KlEstimate kl{stats.kl, 0.0};  // exact: 0 without a reference
  if (loss.kl_kind != KlKind::exact) {
    const double d = loss.ref_logprobs ? static_cast<double>(stats.logprob) - (*loss.ref_logprobs)[row] : 0.0;
    kl = loss.kl_kind == KlKind::k2 ? k2(d) : k3(d);
  }
  const double scale = 1.0 / loss.normalizer;
  return {{static_cast<float>(token.loss), stats.entropy, static_cast<float>(kl.value),
           static_cast<float>(token.approximate_kl), static_cast<float>(token.clipped),
           static_cast<float>(token.dual_clipped), static_cast<float>(token.ratio), 1.0f},
          {(token.d_logprob + loss.kl_coef * kl.d_logprob) * scale, -loss.entropy_coef * scale, 0.0,
           loss.kl_kind == KlKind::exact ? loss.kl_coef * scale : 0.0}};
}

void policy_loss_in_chunk(const Tensor& logits, const Tensor& targets, const Tensor& old_logprobs,
                          const Tensor& advantages, const Tensor& normalizer, double temperature,
                          std::optional<double> softcap, double clip_low, double clip_high,
                          std::optional<double> dual_clip, double entropy_coef, double kl_coef,
                          const std::string& kl_kind, const std::optional<Tensor>& ref_logprobs,
                          const std::optional<Tensor>& ref_logits, const std::optional<Tensor>& mask, bool gradient,
                          const Tensor& token_stats) {
  const Vocabulary vocabulary = checked_vocabulary(logits, targets, temperature, softcap, ref_logits);
  const int64_t rows = vocabulary.rows;
  require_writable_rows(logits, "logits");
  require_dtype(token_stats, "token_stats", ScalarType::Float);
  require_shape(token_stats, "token_stats", {8, rows});
  const Loss loss{tokens_of(old_logprobs, "old_logprobs", rows),
                  tokens_of(advantages, "advantages", rows),
                  tokens_of(ref_logprobs, "ref_logprobs", rows),
                  mask_of(mask, rows),
                  clips_of(clip_low, clip_high, dual_clip),
                  entropy_coef,
                  kl_coef,
                  normalizer_of(normalizer),
                  kl_kind_of(kl_kind)};

  float* const columns = token_stats.mutable_data_ptr<float>();
  const int64_t kind_stride = token_stats.stride(0), row_stride = token_stats.stride(1);
  // Row by row, because a row is then still in the cache when its gradient is written.
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<TileStats> tiles(vocabulary.tiles);
    for (int64_t row = begin; row < end; ++row) {
      Outcome outcome{};
      if (loss.keep[row]) {
        for (int64_t tile = 0; tile < vocabulary.tiles; ++tile) tiles[tile] = read_tile(vocabulary, row, tile);
        const RowStats stats = row_stats(vocabulary, row, tiles.data());
        outcome = outcome_of(loss, row, stats);
        const Slopes slopes = row_slopes(vocabulary, stats, outcome.gradients);
        for (int64_t tile = 0; gradient && tile < vocabulary.tiles; ++tile) {
          write_tile(vocabulary, row, tile, slopes, vocabulary.logits);
        }
      } else if (gradient) {
        std::memset(vocabulary.logits.at(row, 0), 0, vocabulary.size * vocabulary.logits.token_bytes);
      }
      for (int64_t kind = 0; kind < 8; ++kind) columns[kind * kind_stride + row * row_stride] = outcome.stats[kind];
    }
  });
}

}  // namespace
}  // namespace fastppo

// logits (m, V) fp32, bf16 or fp16, dense in the last dimension; targets (m,) int64, ref_logits (m, V): as for
// vocabulary_forward. old_logprobs, advantages, ref_logprobs (m,) floating; mask (m,) bool, False excludes a row;
// normalizer () fp32. With `gradient` the logits are overwritten by the gradient of loss / normalizer, 0 in masked
// rows, where loss = sum of -J - entropy_coef H + kl_coef KL. KL is of kl_kind: "exact" from ref_logits, "k2" and "k3"
// from ref_logprobs, and 0 without them. token_stats (8, m) fp32 of any strides receives policy loss -J, entropy, KL,
// approximate KL of old to new, clipped, dual-clipped, ratio, 1; 0 for a masked row.
STABLE_TORCH_LIBRARY_FRAGMENT(fastppo, m) {
  m.def(
      "policy_loss_in_chunk(Tensor(a!) logits, Tensor targets, Tensor old_logprobs, Tensor advantages, "
      "Tensor normalizer, float temperature, float? softcap, float clip_low, float clip_high, float? dual_clip, "
      "float entropy_coef, float kl_coef, str kl_kind, Tensor? ref_logprobs, Tensor? ref_logits, Tensor? mask, "
      "bool gradient, Tensor(b!) token_stats) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastppo, CPU, m) {
  m.impl("policy_loss_in_chunk", TORCH_BOX(&fastppo::policy_loss_in_chunk));
}
