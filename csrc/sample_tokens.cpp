// fastppo::sample_tokens: samples one token a row by the inverse distribution function, on the CPU.
#include "philox.h"
#include "vocabulary_rows.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <tuple>

namespace fastppo {
namespace {

struct Draw {
  int64_t token;
  float logprob;
};

struct Sampler {
  Rows logits;
  int64_t size, tiles, blocks;
  float inverse_temperature;
  SamplerKernels kernels;
  const float* least;        // (rows,) what is kept, or null: everything
  const int64_t* last;       // (rows,)
  std::vector<float> peaks;  // (rows, tiles)
  std::vector<float> sums;   // (rows, blocks) of e^x, relative to the peak of the block's tile

  // What is kept of the tokens from `first` on, of which there are at most kTile.
  Kept kept(int64_t row, int64_t first) const {
    if (least == nullptr) return {};
    return {least[row], static_cast<int32_t>(std::clamp(last[row] - first, int64_t{-1}, kTile))};
  }
};

// The token in `block` at which the distribution function, whose value at the start of the block is `before`, exceeds
// `threshold`; never a token of probability 0. If because of rounding it exceeds it at no token, the last token with a
// probability above 0.
int64_t token_in_block(const Sampler& s, int64_t row, int64_t block, float peak, double before, double threshold) {
  const int64_t first = block * kBlock, count = std::min(kBlock, s.size - first);
  float e[kBlock];
  s.kernels.exponentials(s.logits.at(row, first), count, s.inverse_temperature, peak, s.kept(row, first), e);
  int64_t last = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (e[i] == 0.0f) continue;
    last = i;
    before += e[i];
    if (before > threshold) break;
  }
  return first + last;
}

Draw draw(const Sampler& s, int64_t row, double u) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  const float* const peaks = &s.peaks[row * s.tiles];
  const float* const sums = &s.sums[row * s.blocks];
  const float peak = *std::max_element(peaks, peaks + s.tiles);
  std::vector<double> weights(s.tiles);  // factors from the peak of a tile to that of the row
  for (int64_t t = 0; t < s.tiles; ++t) {
    weights[t] = std::exp((static_cast<double>(peaks[t]) - peak) * s.inverse_temperature);
  }
  double total = 0.0;
  for (int64_t b = 0; b < s.blocks; ++b) total += weights[b * kBlock / kTile] * sums[b];
  if (!(total > 0.0 && std::isfinite(total))) return {0, kNan};

  const double threshold = u * total;
  double before = 0.0;
  int64_t block = 0;
  for (;; ++block) {
    const double next = before + weights[block * kBlock / kTile] * sums[block];
    if (next > threshold) break;  // always before the end, because u < 1
    before = next;
  }
  const int64_t token = token_in_block(s, row, block, peak, before, threshold);
  const double x = (static_cast<double>(s.kernels.widen(s.logits.at(row, token))) - peak) * s.inverse_temperature;
  return {token, static_cast<float>(x - std::log(total))};
}

std::tuple<Tensor, Tensor> sample_tokens(const Tensor& logits, const Tensor& stream, const Tensor& offset,
                                         double temperature, int64_t seed, const std::optional<Tensor>& least,
                                         const std::optional<Tensor>& last) {
  REQUIRE(temperature > 0 && std::isfinite(temperature), "temperature is ", temperature,
          ", expected a positive number");
  Rows readable = readable_rows(logits, "logits");
  const int64_t rows = logits.size(0), size = logits.size(1);
  require_dtype(stream, "stream", ScalarType::Long);
  require_dtype(offset, "offset", ScalarType::Long);
  require_shape(stream, "stream", {rows});
  require_shape(offset, "offset", {rows});
  REQUIRE(least.has_value() == last.has_value(), least ? "last" : "least", " is None; give least and last, or neither");
  std::optional<Tensor> dense_least, dense_last;
  if (least) {
    require_dtype(*least, "least", ScalarType::Float);
    require_dtype(*last, "last", ScalarType::Long);
    require_shape(*least, "least", {rows});
    require_shape(*last, "last", {rows});
    dense_least = torch::stable::contiguous(*least);
    dense_last = torch::stable::contiguous(*last);
  }
  const int64_t tiles = (size + kTile - 1) / kTile, blocks = (size + kBlock - 1) / kBlock;
  Sampler sampler{std::move(readable),
                  size,
                  tiles,
                  blocks,
                  static_cast<float>(1.0 / temperature),
                  sampler_kernels(logits.scalar_type(), least.has_value()),
                  least ? dense_least->const_data_ptr<float>() : nullptr,
                  least ? dense_last->const_data_ptr<int64_t>() : nullptr,
                  std::vector<float>(rows * tiles),
                  std::vector<float>(rows * blocks)};
  Tensor tokens = torch::stable::new_empty(logits, {rows}, ScalarType::Long);
  Tensor logprobs = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  int64_t* const out = tokens.mutable_data_ptr<int64_t>();
  float* const logprob = logprobs.mutable_data_ptr<float>();
  const int64_t *const streams = stream.const_data_ptr<int64_t>(), *const offsets = offset.const_data_ptr<int64_t>();
  const int64_t stream_stride = stream.stride(0), offset_stride = offset.stride(0);
  const auto read = [&](int64_t row, int64_t tile) {
    const int64_t token = tile * kTile;
    sampler.peaks[row * tiles + tile] = sampler.kernels.sum_blocks(
        sampler.logits.at(row, token), std::min(kTile, size - token), sampler.inverse_temperature,
        sampler.kept(row, token), &sampler.sums[row * blocks + token / kBlock]);
  };
  for_each_tile(rows, size, read, [&](int64_t row) {
    const Draw drawn = draw(sampler, row, uniform(seed, streams[row * stream_stride], offsets[row * offset_stride]));
    out[row] = drawn.token;
    logprob[row] = drawn.logprob;
  });
  return {tokens, logprobs};
}

}  // namespace
}  // namespace fastppo

// logits (R, V) fp32, bf16 or fp16 of any strides; stream, offset (R,) int64: with the seed, modulo 2^64, they
// determine the random number u in (0, 1) of a row. The token is the first v with p_0 + ... + p_v > u, p =
// softmax(logits / temperature); a token whose p is 0, or whose e^x underflows, is never sampled. Returns tokens (R,)
// int64 and their log probabilities (R,) fp32, NaN in a row with a NaN, +inf or no finite logit. With least (R,) fp32
// and last (R,) int64, what `truncation` returns, the result is that of logits with -inf at the tokens that are not
// kept. The result of a row depends on that row and its u only, bit for bit.
STABLE_TORCH_LIBRARY_FRAGMENT(fastppo, m) {
  m.def(
      "sample_tokens(Tensor logits, Tensor stream, Tensor offset, float temperature, int seed, Tensor? least=None,"
      " Tensor? last=None) -> (Tensor tokens, Tensor logprobs)");
}

STABLE_TORCH_LIBRARY_IMPL(fastppo, CPU, m) { m.impl("sample_tokens", TORCH_BOX(&fastppo::sample_tokens)); }
