// fastppo::vocabulary_forward and vocabulary_backward: statistics of rows of logits, and their gradient, on the CPU.
#include "vocabulary_rows.h"

#include <torch/csrc/stable/library.h>

namespace fastppo {
namespace {

Tensor vocabulary_forward(const Tensor& logits, const Tensor& targets, double temperature,
                          std::optional<double> softcap, const std::optional<Tensor>& ref_logits) {
  const Vocabulary vocabulary = checked_vocabulary(logits, targets, temperature, softcap, ref_logits);
  const int64_t rows = vocabulary.rows, tiles = vocabulary.tiles, kinds = ref_logits ? kRefStats : kStats;
  Tensor out = torch::stable::new_empty(logits, {kinds, rows}, ScalarType::Float);

  std::vector<TileStats> partial(rows * tiles);
  float* const stats = out.mutable_data_ptr<float>();
  const auto read = [&](int64_t row, int64_t tile) { partial[row * tiles + tile] = read_tile(vocabulary, row, tile); };
  for_each_tile(rows, vocabulary.size, read, [&](int64_t row) {
    const RowStats all = row_stats(vocabulary, row, &partial[row * tiles]);
    const float* const values = &all.logprob;
    for (int64_t kind = 0; kind < kinds; ++kind) stats[kind * rows + row] = values[kind];
  });
  return out;
}

// (kinds, rows) fp32 of any strides.
struct Table {
  const float* data;
  int64_t kind_stride, row_stride;
  float at(int64_t kind, int64_t row) const { return data[kind * kind_stride + row * row_stride]; }
};

Table table_of(const Tensor& x, const char* name, int64_t kinds, int64_t rows) {
  require_dtype(x, name, ScalarType::Float);
  require_shape(x, name, {kinds, rows});
  return {x.const_data_ptr<float>(), x.stride(0), x.stride(1)};
}

void vocabulary_backward(const Tensor& logits, const Tensor& targets, const Tensor& stats, const Tensor& grad,
                         double temperature, std::optional<double> softcap, const std::optional<Tensor>& ref_logits,
                         const Tensor& out) {
  const Vocabulary vocabulary = checked_vocabulary(logits, targets, temperature, softcap, ref_logits);
  const int64_t rows = vocabulary.rows, kinds = ref_logits ? kRefStats : kStats;
  const Table known = table_of(stats, "stats", kinds, rows);
  const Table upstream = table_of(grad, "grad", 4, rows);
  require_dtype(out, "out", logits.scalar_type());
  require_shape(out, "out", {rows, vocabulary.size});
  require_writable_rows(out, "out");

  std::vector<Slopes> slopes(rows);
  for (int64_t row = 0; row < rows; ++row) {
    RowStats all{};
    float* const values = &all.logprob;
    for (int64_t kind = 0; kind < kinds; ++kind) values[kind] = known.at(kind, row);
    slopes[row] = row_slopes(vocabulary, all,
                             {upstream.at(0, row), upstream.at(1, row), upstream.at(2, row), upstream.at(3, row)});
  }
  const Rows gradient(out);
  const auto write = [&](int64_t row, int64_t tile) { write_tile(vocabulary, row, tile, slopes[row], gradient); };
  for_each_tile(rows, vocabulary.size, write, [](int64_t) {});
}

}  // namespace
}  // namespace fastppo

// M rows over a vocabulary of V: logits (M, V) and ref_logits (M, V), fp32, bf16 or fp16, of the same or different
// dtypes and any strides; targets (M,) int64. With z = softcap tanh(logits / softcap) / temperature, x = z - max z, s =
// sum e^x, p = e^x / s, and r, y, s_r for the reference:
//   stats (5, M) fp32: logprob = x_target - log s, entropy = log s - E[x], lse = max z + log s, max of z temperature,
//   log s; with a reference (10, M): also ref_logprob, KL(p || reference) = E[x - y] - log s + log s_r, ref_lse, max of
//   r temperature, log s_r
//   grad (4, M) fp32 of any strides: upstream gradients of logprob, entropy, lse and KL, the last only with a reference
//   out (M, V) in the dtype of logits, dense in the last dimension: d logits =
//   dz/dlogits (g_logprob (1_target - p) + g_lse p - g_entropy p (x - E[x]) + g_kl p (x - y - E[x - y]))
// `out` may be the logits. An entry with p = 0 adds 0 to everything but KL; KL is infinite if p > 0 and the reference
// is -inf, and then has no gradient. Sums over a tile of 4096 tokens are fp32, over tiles fp64, in fixed order.
STABLE_TORCH_LIBRARY_FRAGMENT(fastppo, m) {
  m.def(
      "vocabulary_forward(Tensor logits, Tensor targets, float temperature, float? softcap, Tensor? ref_logits)"
      " -> Tensor");
  m.def(
      "vocabulary_backward(Tensor logits, Tensor targets, Tensor stats, Tensor grad, float temperature, "
      "float? softcap, Tensor? ref_logits, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastppo, CPU, m) {
  m.impl("vocabulary_forward", TORCH_BOX(&fastppo::vocabulary_forward));
  m.impl("vocabulary_backward", TORCH_BOX(&fastppo::vocabulary_backward));
}
