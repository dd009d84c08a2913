#include "vocabulary_rows.h"

#include <cmath>
#include <limits>

namespace fastppo {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The maximum and the sum of exponentials of a row, from those of its tiles.
struct Total {
  float peak;
  double sum, inverse_temperature;

  // The e^z of a tile are relative to the peak of the tile; this factor makes them relative to that of the row.
  double weight(float tile_peak) const {
    return std::exp((static_cast<double>(tile_peak) - peak) * inverse_temperature);
  }
};

// A tile with -inf only: it adds nothing, and has no weight if the whole row is -inf.
bool is_empty(float peak, float sum) { return peak == -std::numeric_limits<float>::infinity() && !std::isnan(sum); }

Total total_of(const TileStats* tiles, int64_t count, float TileStats::* peak, float TileStats::* sum, double inverse) {
  Total total{-std::numeric_limits<float>::infinity(), 0.0, inverse};
  for (int64_t t = 0; t < count; ++t) total.peak = std::max(total.peak, tiles[t].*peak);
  for (int64_t t = 0; t < count; ++t) {
    if (!is_empty(tiles[t].*peak, tiles[t].*sum)) total.sum += total.weight(tiles[t].*peak) * (tiles[t].*sum);
  }
  return total;
}

struct Means {
  double x, gap;  // E[x] and E[x - y]
  bool infinite;  // p > 0 where the reference is -inf
};

Means means_of(const TileStats* tiles, int64_t count, const Total& total, const Total& ref) {
  Means means{0.0, 0.0, false};
  float hole = -std::numeric_limits<float>::infinity();
  for (int64_t t = 0; t < count; ++t) {
    const TileStats& tile = tiles[t];
    hole = std::max(hole, tile.hole);
    if (is_empty(tile.peak, tile.sum)) continue;
    const double weight = total.weight(tile.peak), below = static_cast<double>(tile.peak) - total.peak;
    means.x += weight * (tile.dot + below * tile.sum);
    const double ref_below = std::isinf(tile.ref_peak) ? 0.0 : static_cast<double>(tile.ref_peak) - ref.peak;
    means.gap += weight * (tile.gap + (below - ref_below) * tile.sum);
  }
  means.x *= total.inverse_temperature / total.sum;
  means.gap *= total.inverse_temperature / total.sum;
  means.infinite = (static_cast<double>(hole) - total.peak) * total.inverse_temperature > kSmallestExponent;
  return means;
}

}  // namespace

Rows readable_rows(const Tensor& x, const char* name) {
  REQUIRE(x.dim() == 2 && x.size(1) > 0, name, " has shape ", shape(x), ", expected (rows, vocabulary)");
  require_floating(x, name);
  return Rows(x.size(1) == 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x));
}

Vocabulary checked_vocabulary(const Tensor& logits, const Tensor& targets, double temperature,
                              std::optional<double> softcap, const std::optional<Tensor>& ref_logits) {
  REQUIRE(temperature > 0 && std::isfinite(temperature), "temperature is ", temperature,
          ", expected a positive number");
  REQUIRE(!softcap || (*softcap > 0 && std::isfinite(*softcap)), "softcap is ", *softcap,
          ", expected a positive number or None");
  Rows rows = readable_rows(logits, "logits");
  const int64_t count = logits.size(0), size = logits.size(1);
  std::optional<Rows> ref;
  if (ref_logits) {
    require_shape(*ref_logits, "ref_logits", {count, size});
    ref = readable_rows(*ref_logits, "ref_logits");
  }
  require_dtype(targets, "targets", ScalarType::Long);
  require_shape(targets, "targets", {count});
  const Tensor dense = torch::stable::contiguous(targets);
  const int64_t* const tokens = dense.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    REQUIRE(tokens[i] >= 0 && tokens[i] < size, "targets[", i, "] is ", tokens[i], "; a vocabulary of ", size,
            " allows 0 to ", size - 1);
  }
  std::optional<ScalarType> ref_dtype;
  if (ref) ref_dtype = ref->tensor.scalar_type();
  const Scale scale{static_cast<float>(1.0 / temperature), static_cast<float>(softcap.value_or(0.0))};
  return {std::move(rows),
          std::move(ref),
          dense,
          tokens,
          count,
          size,
          (size + kTile - 1) / kTile,
          scale,
          tile_kernels(logits.scalar_type(), ref_dtype, softcap.has_value()),
          tile_kernels(logits.scalar_type(), std::nullopt, softcap.has_value()),
          tile_kernels(ref_dtype.value_or(logits.scalar_type()), std::nullopt, softcap.has_value())};
}

TileStats read_tile(const Vocabulary& v, int64_t row, int64_t tile) {
  const int64_t token = tile * kTile;
  return v.kernels.read(v.logits.at(row, token), v.ref_at(row, token), v.tile_size(tile), v.scale);
}

RowStats row_stats(const Vocabulary& v, int64_t row, const TileStats* tiles) {
  const double inverse = v.scale.inverse_temperature;
  const int64_t target = v.targets[row];
  const Total total = total_of(tiles, v.tiles, &TileStats::peak, &TileStats::sum, inverse);
  const Total ref_total = v.ref ? total_of(tiles, v.tiles, &TileStats::ref_peak, &TileStats::ref_sum, inverse) : total;
  const Means means = means_of(tiles, v.tiles, total, ref_total);

  RowStats stats{};
  const double log_sum = std::log(total.sum);
  const double chosen = v.plain.cap(v.logits.at(row, target), v.scale);
  stats.logprob = static_cast<float>((chosen - total.peak) * inverse - log_sum);
  stats.entropy = static_cast<float>(log_sum - means.x);
  stats.lse = static_cast<float>(total.peak * inverse + log_sum);
  stats.peak = total.peak;
  stats.log_total = static_cast<float>(log_sum);
  if (!v.ref) return stats;

  const double ref_log_sum = std::log(ref_total.sum);
  const double ref_chosen = v.ref_kernels.cap(v.ref->at(row, target), v.scale);
  const bool excluded = ref_total.sum == 0.0;  // the whole row is -inf
  stats.ref_logprob = static_cast<float>(excluded ? -kInfinity : (ref_chosen - ref_total.peak) * inverse - ref_log_sum);
  const bool infinite = means.infinite && !std::isnan(log_sum) && !std::isnan(ref_log_sum);
  stats.kl = static_cast<float>(infinite ? kInfinity : means.gap - log_sum + ref_log_sum);
  stats.ref_lse = static_cast<float>(ref_total.peak * inverse + ref_log_sum);
  stats.ref_peak = ref_total.peak;
  stats.ref_log_total = static_cast<float>(ref_log_sum);
  return stats;
}

Slopes row_slopes(const Vocabulary& v, const RowStats& stats, const RowGradients& upstream) {
  // An infinite KL has no gradient.
  const double kl_slope = v.ref && !std::isinf(stats.kl) ? upstream.kl : 0.0;
  const double mean_x = static_cast<double>(stats.log_total) - stats.entropy;
  double constant = upstream.lse - upstream.logprob + upstream.entropy * mean_x;
  if (kl_slope != 0.0) {
    constant -= kl_slope * (static_cast<double>(stats.kl) + stats.log_total - stats.ref_log_total);  // E[x - y]
  }
  const double inverse = v.scale.inverse_temperature;
  const double share = std::exp(-static_cast<double>(stats.log_total)) * inverse;  // p = e^x share / inverse
  return {stats.peak,
          stats.ref_peak,
          static_cast<float>(constant * share),
          static_cast<float>(-upstream.entropy * share * inverse),
          static_cast<float>(kl_slope * share * inverse),
          static_cast<float>(upstream.logprob * inverse)};
}

void write_tile(const Vocabulary& v, int64_t row, int64_t tile, const Slopes& slopes, const Rows& out) {
  const int64_t token = tile * kTile, size = v.tile_size(tile), target = v.targets[row] - token;
  const bool with_ref = slopes.gap_slope != 0.0f;
  const auto write = with_ref ? v.kernels.write : v.plain.write;
  write(v.logits.at(row, token), v.ref_at(row, token), out.at(row, token), size, v.scale, slopes,
        target >= 0 && target < size ? target : -1);
}

}  // namespace fastppo
