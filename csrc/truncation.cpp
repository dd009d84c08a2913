// fastppo::truncation: which tokens top_k and top_p keep, by radix selection, on the CPU.
#include "simd.h"
#include "vocabulary_rows.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>

namespace fastppo {
namespace {

#define BODY "truncation.inc"
#include "levels.inc"

struct Kernels {
  float (*highest)(const void* logits, int64_t count);
  void (*keys_of)(const void* logits, int64_t count, uint32_t* keys);
  void (*masses)(const uint32_t* keys, int64_t count, double peak, double rate, double* out);
};

template <typename T>
Kernels kernels_of() {
  return {AT_LEVEL(highest<T>), AT_LEVEL(keys_of<T>), AT_LEVEL(masses)};
}

Kernels kernels_of(ScalarType logits) {
  if (logits == ScalarType::Float) return kernels_of<float>();
  if (logits == ScalarType::Half) return kernels_of<Half>();
  return kernels_of<BFloat16>();
}

constexpr int64_t kSome = 512;  // tokens whose keys and weights are in the first-level cache at a time

// The bits of a key that each step of the selection sorts into bins.
struct Digit {
  int shift, bits;
  uint32_t of(uint32_t key) const { return (key >> shift) & ((1u << bits) - 1); }
};
constexpr Digit kDigits[] = {{21, 11}, {10, 11}, {0, 10}};
constexpr int64_t kBins = 1 << 11;

struct Buffers {
  std::vector<uint32_t> candidates;  // keys that have the digits found so far
  std::vector<double> bins[2];       // tokens take turns, so that one addition does not wait for the one before
  alignas(64) uint32_t keys[kSome];
  alignas(64) double weights[kSome];

  explicit Buffers(int64_t vocabulary)
      : candidates(vocabulary + kSome), bins{std::vector<double>(kBins), std::vector<double>(kBins)} {}
};

struct Row {
  const char* logits;
  int64_t size, token_bytes;
  const Kernels& kernels;

  // f(keys, count) for some tokens at a time, in order, until it returns false.
  template <typename F>
  void for_some(Buffers& b, const F& f) const {
    for (int64_t i = 0; i < size; i += kSome) {
      const int64_t count = std::min(kSome, size - i);
      kernels.keys_of(logits + i * token_bytes, count, b.keys);
      if (!f(i, count)) return;
    }
  }
};

// What a token counts for in a selection: 1, or its e^((logit - peak) rate).
struct Weights {
  bool ones;
  double peak, rate;

  void fill(const Kernels& kernels, const uint32_t* keys, int64_t count, double* out) const {
    if (ones) {
      std::fill(out, out + count, 1.0);
    } else {
      kernels.masses(keys, count, peak, rate, out);
    }
  }
};

// The token at which the weights, added from the largest logit down, reach the goal.
struct Found {
  uint32_t key;
  double above;  // weight of all tokens with a larger key
  double goal;
  int64_t ties;  // tokens with this key
};

// The bin in which the sum from above reaches the goal; the last one with a weight if because of rounding none does.
// Adds to `above` what the higher bins weigh.
uint32_t bin_at(const std::vector<double>& bins, double goal, double& above) {
  double sum = above;
  uint32_t found = 0;
  for (int64_t bin = kBins - 1; bin >= 0; --bin) {
    if (!(bins[bin] > 0.0)) continue;
    found = bin;
    above = sum;
    sum += bins[bin];
    if (sum >= goal) break;
  }
  return found;
}

// Selects among the tokens with keys from `floor` on; the goal is `goal`, or `share` of their weight if `goal` is 0.
// False if the weights are not numbers or all 0.
bool select(const Row& row, const Weights& weights, uint32_t floor, double goal, double share, Buffers& b,
            Found& found) {
  for (auto& bins : b.bins) std::fill(bins.begin(), bins.end(), 0.0);
  row.for_some(b, [&](int64_t, int64_t count) {
    weights.fill(row.kernels, b.keys, count, b.weights);
    for (int64_t i = 0; i < count; ++i) {
      b.bins[i & 1][kDigits[0].of(b.keys[i])] += b.keys[i] >= floor ? b.weights[i] : 0.0;
    }
    return true;
  });
  double total = 0.0, above = 0.0;
  for (int64_t bin = kBins - 1; bin >= 0; --bin) total += b.bins[0][bin] += b.bins[1][bin];
  if (!(total > 0.0 && std::isfinite(total))) return false;
  if (goal == 0.0) goal = share * total;

  uint32_t bin = bin_at(b.bins[0], goal, above);
  uint32_t* const candidates = b.candidates.data();
  int64_t count = 0;
  row.for_some(b, [&](int64_t, int64_t some) {
    for (int64_t i = 0; i < some; ++i) {
      candidates[count] = b.keys[i];
      count += kDigits[0].of(b.keys[i]) == bin && b.keys[i] >= floor;
    }
    return true;
  });
  for (const Digit digit : {kDigits[1], kDigits[2]}) {
    std::fill(b.bins[0].begin(), b.bins[0].end(), 0.0);
    for (int64_t first = 0; first < count; first += kSome) {
      const int64_t some = std::min(kSome, count - first);
      weights.fill(row.kernels, candidates + first, some, b.weights);
      for (int64_t i = 0; i < some; ++i) b.bins[0][digit.of(candidates[first + i])] += b.weights[i];
    }
    bin = bin_at(b.bins[0], goal, above);
    int64_t left = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t key = candidates[i];
      candidates[left] = key;
      left += digit.of(key) == bin;
    }
    count = left;
  }
  found = {candidates[0], above, goal, count};
  return true;
}

struct Kept {
  float least;
  int64_t last;
};

float value_of(uint32_t key) {
  const uint32_t bits = key ^ (key >> 31 ? 0x80000000u : 0xffffffffu);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

Kept kept(const Row& row, double temperature, int64_t top_k, double top_p, Buffers& b) {
  Kept kept{-std::numeric_limits<float>::infinity(), row.size};
  uint32_t floor = 0;
  Found found;
  if (top_k > 0 && top_k < row.size && select(row, {true, 0.0, 0.0}, 0, static_cast<double>(top_k), 0.0, b, found)) {
    floor = found.key;
    kept.least = value_of(floor);
  }
  if (top_p >= 1.0) return kept;
  const Weights weights{false, row.kernels.highest(row.logits, row.size), 1.0 / temperature};
  if (!select(row, weights, floor, 0.0, top_p, b, found)) return kept;
  kept.least = value_of(found.key);
  std::fill(b.keys, b.keys + kSome, found.key);
  weights.fill(row.kernels, b.keys, 1, b.weights);
  const double needed = std::ceil((found.goal - found.above) / b.weights[0]);  // of equal tokens
  if (needed >= static_cast<double>(found.ties)) return kept;
  int64_t left = std::max<int64_t>(1, static_cast<int64_t>(needed));
  row.for_some(b, [&](int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      if (b.keys[i] != found.key || --left > 0) continue;
      kept.last = first + i;
      return false;
    }
    return true;
  });
  return kept;
}

std::tuple<Tensor, Tensor> truncation(const Tensor& logits, double temperature, int64_t top_k, double top_p) {
  REQUIRE(temperature > 0 && std::isfinite(temperature), "temperature is ", temperature,
          ", expected a positive number");
  REQUIRE(top_k >= 0, "top_k is ", top_k, ", expected 0 for none or a positive number");
  REQUIRE(top_p > 0 && top_p <= 1, "top_p is ", top_p, ", expected a number above 0, and 1 at most");
  const Rows readable = readable_rows(logits, "logits");
  const int64_t rows = logits.size(0), size = logits.size(1);
  Tensor least = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  Tensor last = torch::stable::new_empty(logits, {rows}, ScalarType::Long);
  float* const out = least.mutable_data_ptr<float>();
  int64_t* const out_last = last.mutable_data_ptr<int64_t>();
  const Kernels kernels = kernels_of(logits.scalar_type());
  const int64_t grain = std::max<int64_t>(1, 5'000 / size);  // of tokens, for about 10 us of work
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    Buffers buffers(size);
    for (int64_t i = begin; i < end; ++i) {
      const Kept found =
          kept({readable.at(i, 0), size, readable.token_bytes, kernels}, temperature, top_k, top_p, buffers);
      out[i] = found.least;
      out_last[i] = found.last;
    }
  });
  return {least, last};
}

}  // namespace
}  // namespace fastppo

// logits (R, V) fp32, bf16 or fp16 of any strides. Returns least (R,) fp32 and last (R,) int64: kept are the tokens
// with a logit above `least`, and of those equal to it the ones up to index `last`. top_k (0: off) keeps the k largest
// logits and all that are equal to the k-th; top_p (1: off) the smallest set of the largest of these whose probability,
// p = softmax(logits / temperature) among them, reaches top_p, of equal ones the first. Probabilities and their sums
// are fp64. `least` is -inf in a row with NaN, +inf or no finite logit. The result of a row depends on that row only.
STABLE_TORCH_LIBRARY_FRAGMENT(fastppo, m) {
  m.def("truncation(Tensor logits, float temperature, int top_k, float top_p) -> (Tensor least, Tensor last)");
}

STABLE_TORCH_LIBRARY_IMPL(fastppo, CPU, m) { m.impl("truncation", TORCH_BOX(&fastppo::truncation)); }
