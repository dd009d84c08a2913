// The loops over a vocabulary, a tile of a row at a time: what every vocabulary op spends its time in.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>

namespace fastppo {

// Tokens a tile holds at most. A tile of logits and one of a reference's stay in the first-level cache from the search
// of their maximum to the sum of their exponentials. Fixed, since the order of summation is part of a result.
constexpr int64_t kTile = 4096;
constexpr int64_t kBlock = 256;  // tokens of one entry of a sampler's distribution function; divides kTile

// Below this, e^x counts as 0: p is 0 there, for statistics, gradients and the sampler alike.
constexpr float kSmallestExponent = -87.0f;

// From logits to z = c / temperature, c = softcap tanh(logits / softcap), or the logits themselves without a softcap.
struct Scale {
  float inverse_temperature;
  float softcap;  // 0: none
};

// Statistics of a tile, with x = (c - peak) / temperature, and q, y the reference's c, x.
struct TileStats {
  float peak, ref_peak;  // max c and max q
  float hole;            // max c where q is -inf
  float sum, dot;        // sums of e^x and e^x (c - peak)
  float ref_sum;         // sum of e^y
  float gap;             // sum of e^x ((c - peak) - (q - ref_peak)) where q is finite
};

// d logits = e^(x / temperature) (constant + slope x + gap_slope (x - y)) dc/dlogits, and at the target also += target
// dc/dlogits; here x = c - peak and y = q - ref_peak, with the peaks of the row.
struct Slopes {
  float peak, ref_peak;
  float constant, slope, gap_slope, target;
};

// Functions of `count` <= kTile tokens. Each row lies dense; `ref` is not looked at where the kernels are for none.
struct TileKernels {
  TileStats (*read)(const void* logits, const void* ref, int64_t count, Scale scale);
  // `out`, in the dtype of logits, may be `logits`. `target` is the target's place in this tile, or -1.
  void (*write)(const void* logits, const void* ref, void* out, int64_t count, Scale scale, const Slopes& slopes,
                int64_t target);
  // c of one logit, rounded as in `read`.
  float (*cap)(const void* logit, Scale scale);
};

TileKernels tile_kernels(torch::headeronly::ScalarType logits, std::optional<torch::headeronly::ScalarType> ref,
                         bool capped);

struct SamplerKernels {
  // Sums of e^x over blocks of kBlock tokens, x as above; returns the tile's peak.
  float (*sum_blocks)(const void* logits, int64_t count, float inverse_temperature, float* sums);
  // out[i] = e^((logit - peak) / temperature); `count` is at most kBlock.
  void (*exponentials)(const void* logits, int64_t count, float inverse_temperature, float peak, float* out);
  float (*widen)(const void* logit);
};

SamplerKernels sampler_kernels(torch::headeronly::ScalarType logits);

}  // namespace fastppo
