// fastppo::attend_cached: one decode step of attention over a key/value cache, on the CPU.
#include "checks.h"
#include "simd.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace fastppo {
namespace {

constexpr int64_t kTile = 16;  // positions converted to fp32 at a time; a multiple of the lanes of every level

template <typename T>
struct Heads {  // (rows, heads, width), the last dimension dense
  const T* data;
  int64_t row_stride, head_stride;
  const T* at(int64_t row, int64_t head) const { return data + row * row_stride + head * head_stride; }
};

template <typename T>
struct Cache {  // (rows, kv heads, positions, width), the last dimension dense
  T* data;
  int64_t row_stride, head_stride, stride;
  T* at(int64_t row, int64_t head) const { return data + row * row_stride + head * head_stride; }
};

struct Span {  // positions [start, stop) of a cache row to which an active row attends
  int64_t row, start, stop;
};

template <typename T>
struct Call {
  Heads<T> query, key, value;
  Cache<T> key_cache, value_cache;
  T* out;
  const Span* spans;
  int64_t kv_heads, group, width, padded, scores;
  float scale, softcap;
};

#define BODY "attend_cached.inc"
#include "levels.inc"

void require_heads(const Tensor& x, const char* name, const Tensor& query, int64_t heads) {
  REQUIRE(x.dim() == 3 && x.size(0) == query.size(0) && x.size(1) == heads && x.size(2) == query.size(2), name,
          " has shape ", shape(x), ", expected (", query.size(0), ", ", heads, ", ", query.size(2), ")");
  REQUIRE(x.stride(2) == 1, name, " must be dense in its last dimension");
  REQUIRE(x.scalar_type() == query.scalar_type(), name, " must have the dtype of query");
}

void require_cache(const Tensor& x, const char* name, const Tensor& query) {
  REQUIRE(x.dim() == 4 && x.size(3) == query.size(2), name, " has shape ", shape(x),
          ", expected (rows, kv heads, positions, ", query.size(2), ")");
  REQUIRE(x.stride(3) == 1, name, " must be dense in its last dimension");
  for (int64_t i = 0; i < 3; ++i) {
    REQUIRE(x.size(i) <= 1 || x.stride(i) != 0, name, " is expanded: what is written at one place stands at others");
  }
  REQUIRE(x.scalar_type() == query.scalar_type(), name, " must have the dtype of query");
}

std::vector<int64_t> indices(const Tensor& x, const char* name, int64_t count) {
  const bool is_int = x.scalar_type() == ScalarType::Int;
  REQUIRE(is_int || x.scalar_type() == ScalarType::Long, name, " must be int32 or int64");
  REQUIRE(x.dim() == 1 && x.size(0) == count, name, " has shape ", shape(x), ", expected (", count, ",)");
  REQUIRE(x.is_contiguous(), name, " must be contiguous");
  const void* data = x.data_ptr();
  if (is_int) return {static_cast<const int32_t*>(data), static_cast<const int32_t*>(data) + count};
  return {static_cast<const int64_t*>(data), static_cast<const int64_t*>(data) + count};
}

std::vector<Span> spans_of(const std::vector<int64_t>& lengths, const std::vector<int64_t>& rows, int64_t capacity,
                           int64_t window) {
  const int64_t total = lengths.size();
  std::vector<Span> spans(rows.size());
  std::vector<bool> taken(total);
  for (size_t r = 0; r < rows.size(); ++r) {
    const int64_t row = rows[r];
    REQUIRE(row >= 0 && row < total, "rows[", r, "] is ", row, ", and key_cache has ", total, " rows");
    REQUIRE(!taken[row], "rows names row ", row, " twice");
    taken[row] = true;
    const int64_t length = lengths[row];
    REQUIRE(length >= 0 && length < capacity, "lengths[", row, "] is ", length, ", and key_cache holds ", capacity,
            " positions a row: no place for one more");
    spans[r] = {row, window > 0 ? std::max<int64_t>(0, length + 1 - window) : 0, length + 1};
  }
  return spans;
}

template <typename T>
Heads<T> heads_of(const Tensor& x) {
  return {static_cast<const T*>(x.data_ptr()), x.stride(0), x.stride(1)};
}

template <typename T>
Cache<T> cache_of(const Tensor& x) {
  return {static_cast<T*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

template <typename T>
void run(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& key_cache,
         const Tensor& value_cache, const Tensor& out, const std::vector<Span>& spans, double scale, double softcap) {
  const int64_t kv_heads = key.size(1), group = query.size(1) / kv_heads, width = query.size(2);
  int64_t longest = 0, work = 0;
  for (const Span& span : spans) {
    longest = std::max(longest, span.stop - span.start);
    work += (span.stop - span.start) * group * width;
  }
  const int64_t padded = (width + kTile - 1) / kTile * kTile;
  const int64_t scores = (longest + kTile - 1) / kTile * kTile;
  const Call<T> call{heads_of<T>(query),
                     heads_of<T>(key),
                     heads_of<T>(value),
                     cache_of<T>(key_cache),
                     cache_of<T>(value_cache),
                     static_cast<T*>(out.data_ptr()),
                     spans.data(),
                     kv_heads,
                     group,
                     width,
                     padded,
                     scores,
                     static_cast<float>(scale),
                     static_cast<float>(softcap)};
  const auto attend = AT_LEVEL(attend<T>);
  const int64_t items = static_cast<int64_t>(spans.size()) * kv_heads;
  const int64_t floats = (2 * group + kTile) * padded + group * scores + group;
  // Waking a thread pays off for about 10 us of work: about 100,000 products.
  const int64_t grain = std::max<int64_t>(1, 100'000 * static_cast<int64_t>(spans.size()) / std::max<int64_t>(1, work));
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    constexpr std::align_val_t line{64};
    const auto release = [](float* p) { ::operator delete(p, std::align_val_t{64}); };
    const std::unique_ptr<float, decltype(release)> scratch(
        static_cast<float*>(::operator new(floats * sizeof(float), line)), release);
    attend(call, scratch.get(), begin, end);
  });
}

Tensor attend_cached(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& key_cache,
                     const Tensor& value_cache, const Tensor& lengths, const Tensor& rows, double scale, int64_t window,
                     double softcap) {
  const ScalarType dtype = query.scalar_type();
  REQUIRE(query.dim() == 3, "query has shape ", shape(query), ", expected (rows, heads, width)");
  REQUIRE(query.size(2) > 0 && query.stride(2) == 1, "query must be dense in its last dimension, and not empty");
  REQUIRE(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
          "query must be float32, bfloat16 or float16");
  require_cache(key_cache, "key_cache", query);
  require_cache(value_cache, "value_cache", query);
  for (int64_t i = 0; i < 3; ++i) {
    REQUIRE(value_cache.size(i) == key_cache.size(i), "value_cache has shape ", shape(value_cache), ", key_cache ",
            shape(key_cache));
  }
  const int64_t kv_heads = key_cache.size(1);
  REQUIRE(kv_heads > 0 && query.size(1) % kv_heads == 0, "query has ", query.size(1), " heads, and key_cache ",
          kv_heads, ": not a multiple");
  require_heads(key, "key", query, kv_heads);
  require_heads(value, "value", query, kv_heads);
  REQUIRE(window >= 0, "window is ", window, ", expected a number of positions, or 0 for no window");
  REQUIRE(softcap >= 0, "softcap is ", softcap, ", expected a positive bound, or 0 for none");

  const std::vector<Span> spans = spans_of(indices(lengths, "lengths", key_cache.size(0)),
                                           indices(rows, "rows", query.size(0)), key_cache.size(2), window);
  Tensor out = torch::stable::new_empty(query, query.sizes());
  const auto kernel = dtype == ScalarType::Float      ? &run<float>
                      : dtype == ScalarType::BFloat16 ? &run<BFloat16>
                                                      : &run<Half>;
  kernel(query, key, value, key_cache, value_cache, out, spans, scale, softcap);
  return out;
}

}  // namespace
}  // namespace fastppo

// Writes the newest key and value of R active rows to the cache, at position lengths[row] of their row; then each query
// attends to positions 0 .. lengths[row] of its row, or to the last `window` of them if window is not 0:
// softmax(s) v, s = scale * q k, or softcap * tanh(scale * q k / softcap) if softcap is not 0. Sums are fp32.
//   query (R, heads, width), key and value (R, kv heads, width), fp32, bf16 or fp16, dense in the last dimension
//   key_cache, value_cache (rows, kv heads, positions, width), dense in the last dimension, written in place
//   lengths (rows,) and rows (R,), int32 or int64: number of earlier positions, and the cache row of each active row
// Returns (R, heads, width) in the dtype of the query. The result of a row depends on that row only, bit for bit.
STABLE_TORCH_LIBRARY_FRAGMENT(fastppo, m) {
  m.def(
      "attend_cached(Tensor query, Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
      "Tensor lengths, Tensor rows, float scale, int window=0, float softcap=0.0) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastppo, CPU, m) { m.impl("attend_cached", TORCH_BOX(&fastppo::attend_cached)); }
