// Rows of logits, with targets and an optional reference: checked arguments, statistics and gradients of a row.
#pragma once

#include "checks.h"
#include "vocabulary_tiles.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

namespace fastppo {

// (M, V) of any floating dtype and any row stride, dense in the last dimension; offsets may exceed 2^31 elements.
struct Rows {
  Tensor tensor;  // keeps the memory alive
  char* data;
  int64_t row_bytes, token_bytes;

  explicit Rows(const Tensor& x)
      : tensor(x),
        data(static_cast<char*>(x.data_ptr())),
        row_bytes(x.stride(0) * static_cast<int64_t>(x.element_size())),
        token_bytes(x.element_size()) {}
  char* at(int64_t row, int64_t token) const { return data + row * row_bytes + token * token_bytes; }
};

// The (M, V) argument `x`, or a copy if it is not dense in its last dimension.
Rows readable_rows(const Tensor& x, const char* name);

struct Vocabulary {
  Rows logits;
  std::optional<Rows> ref;
  Tensor targets_tensor;
  const int64_t* targets;  // (rows,)
  int64_t rows, size, tiles;
  Scale scale;
  TileKernels kernels, plain, ref_kernels;  // of both rows, of logits only, of the reference only

  int64_t tile_size(int64_t tile) const { return std::min(kTile, size - tile * kTile); }
  const char* ref_at(int64_t row, int64_t token) const { return ref ? ref->at(row, token) : nullptr; }
};

// Checks the arguments that all vocabulary ops have; nothing is written before it returns.
Vocabulary checked_vocabulary(const Tensor& logits, const Tensor& targets, double temperature,
                              std::optional<double> softcap, const std::optional<Tensor>& ref_logits);

constexpr int64_t kStats = 5, kRefStats = 10;

// Statistics of a row, in the order of the output of vocabulary_forward; those from ref_logprob on only with a
// reference. The peaks are max c and max q, which fp32 represents exactly; max z would be rounded.
struct RowStats {
  float logprob, entropy, lse, peak, log_total;
  float ref_logprob, kl, ref_lse, ref_peak, ref_log_total;
};

// Upstream gradients of a row's statistics.
struct RowGradients {
  double logprob, entropy, lse, kl;
};

TileStats read_tile(const Vocabulary& vocabulary, int64_t row, int64_t tile);

// `tiles`: all tiles of the row, in order.
RowStats row_stats(const Vocabulary& vocabulary, int64_t row, const TileStats* tiles);

Slopes row_slopes(const Vocabulary& vocabulary, const RowStats& stats, const RowGradients& upstream);

// `out` may be the logits.
void write_tile(const Vocabulary& vocabulary, int64_t row, int64_t tile, const Slopes& slopes, const Rows& out);

// Calls f(row, tile) for all tiles of all rows, on several threads, and finish(row) on the thread that ends the last
// tile of a row.
template <typename F, typename G>
void for_each_tile(int64_t rows, int64_t vocabulary, const F& f, const G& finish) {
  const int64_t tiles = (vocabulary + kTile - 1) / kTile;
  std::vector<std::atomic<int64_t>> left(rows);
  for (auto& count : left) count.store(tiles, std::memory_order_relaxed);
  // Waking a thread pays off for about 10 us of work: about 30,000 tokens.
  const int64_t grain = std::max<int64_t>(1, 30'000 / std::min(vocabulary, kTile));
  torch::stable::parallel_for(0, rows * tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / tiles;
      f(row, i % tiles);
      if (left[row].fetch_sub(1, std::memory_order_acq_rel) == 1) finish(row);
    }
  });
}

}  // namespace fastppo
