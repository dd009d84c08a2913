// The loops over a vocabulary, one tile of a row at a time, in which the vocabulary ops spend their time.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>

namespace fastppo {

// The largest number of tokens in a tile. A tile of logits and one of a reference stay in the first-level cache from
// the search of their maximum to the sum of their exponentials. Fixed, because the order of summation changes results.
constexpr int64_t kTile = 4096;
constexpr int64_t kBlock = 256;  // tokens of one entry of the distribution function in sampling; divides kTile

// For x below this, e^x counts as 0, and so does p: in statistics, gradients and sampling.
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

// Functions of `count` <= kTile tokens. Rows are dense; `ref` is not read by kernels without a reference.
struct TileKernels {
  TileStats (*read)(const void* logits, const void* ref, int64_t count, Scale scale);
  // `out`, in the dtype of logits, may be `logits`. `target` is the index of the target in this tile, or -1.
  void (*write)(const void* logits, const void* ref, void* out, int64_t count, Scale scale, const Slopes& slopes,
                int64_t target);
  // c of one logit, rounded as in `read`.
  float (*cap)(const void* logit, Scale scale);
};

TileKernels tile_kernels(torch::headeronly::ScalarType logits, std::optional<torch::headeronly::ScalarType> ref,
                         bool capped);

// What top_k and top_p keep of some tokens: logits above `least`, and those equal to it up to index `last`.
struct Kept {
  float least;
  int32_t last;
};

// `kept` is not read by kernels that are not truncated; the others take a token that is not kept for one of -inf.
struct SamplerKernels {
  // Sums of e^x over blocks of kBlock tokens, x as above; returns the tile's peak.
  float (*sum_blocks)(const void* logits, int64_t count, float inverse_temperature, Kept kept, float* sums);
  // out[i] = e^((logit - peak) / temperature); `count` is at most kBlock.
  void (*exponentials)(const void* logits, int64_t count, float inverse_temperature, float peak, Kept kept, float* out);
  float (*widen)(const void* logit);
};

SamplerKernels sampler_kernels(torch::headeronly::ScalarType logits, bool truncated);

}  // namespace fastppo
