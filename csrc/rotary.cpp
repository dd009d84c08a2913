// fastppo::rotary: rotary position embeddings of queries and keys (Su et al., 2021), on the CPU.
#include "checks.h"
#include "simd.h"
#include "streams.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

namespace fastppo {
namespace {

struct Strides {  // in numbers
  int64_t row, head, position;
};

struct Heads {  // (rows, heads, positions, width), the last dimension dense
  const void* from;
  void* to;
  Strides in, out;
  int64_t count, width;
};

struct Turn {  // cos and sin, (rows or 1, positions, width), the last dimension dense
  const void *cos, *sin;
  int64_t cos_row, cos_position, sin_row, sin_position;
  int64_t positions, width;
  bool interleaved, transposed, stream;
};

#define BODY "rotary.inc"
#include "levels.inc"

constexpr int64_t kGrain = 16384;  // numbers for which waking a thread pays off

void require_heads(const Tensor& x, const char* name, const Tensor& q) {
  require_floating(x, name);
  REQUIRE(x.dim() == 4, name, " has shape ", shape(x), ", expected (rows, heads, positions, width)");
  require_dtype(x, name, q.scalar_type());
  REQUIRE(x.size(0) == q.size(0) && x.size(2) == q.size(2) && x.size(3) == q.size(3), name, " has shape ", shape(x),
          ", expected (", q.size(0), ", heads, ", q.size(2), ", ", q.size(3), ")");
}

void require_factors(const Tensor& x, const char* name, const Tensor& q, const Tensor& cos) {
  require_floating(x, name);
  REQUIRE(x.dim() == 3 && (x.size(0) == 1 || x.size(0) == q.size(0)) && x.size(1) == q.size(2), name, " has shape ",
          shape(x), ", expected (", q.size(0), " or 1, ", q.size(2), ", width)");
  REQUIRE(x.size(2) <= q.size(3) && x.size(2) % 2 == 0, name, " has width ", x.size(2),
          ", expected an even one, at most q's ", q.size(3));
  require_dtype(x, name, cos.scalar_type());
  REQUIRE(x.sizes().equals(cos.sizes()), name, " has shape ", shape(x), ", expected ", shape(cos));
}

Tensor with_dense_last(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) <= 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}

Strides strides_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

// Dense, with the heads of a position side by side if they are closer than its positions in x.
Tensor empty_in_order_of(const Tensor& x) {
  if (x.stride(1) > x.stride(2)) return torch::stable::new_empty(x, x.sizes());
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(2), x.size(1), x.size(3)});
  return torch::stable::transpose(out, 1, 2);
}

Heads heads_of(const Tensor& x, const Tensor& out) {
  return {x.data_ptr(), out.data_ptr(), strides_of(x), strides_of(out), x.size(1), x.size(3)};
}

int64_t row_stride(const Tensor& x) { return x.size(0) == 1 ? 0 : x.stride(0); }

using Kernel = void (*)(const Turn&, const Heads&, const Heads&, float*, int64_t, int64_t);

template <typename T>
Kernel kernel_of(ScalarType factors) {
  return factors == ScalarType::Float      ? AT_LEVEL(turn_tokens<T, float>)
         : factors == ScalarType::BFloat16 ? AT_LEVEL(turn_tokens<T, BFloat16>)
                                           : AT_LEVEL(turn_tokens<T, Half>);
}

std::tuple<Tensor, Tensor> rotary(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                                  bool interleaved, bool transposed) {
  require_heads(q, "q", q);
  require_heads(k, "k", q);
  require_factors(cos, "cos", q, cos);
  require_factors(sin, "sin", q, cos);
  const Tensor queries = with_dense_last(q), keys = with_dense_last(k);
  const Tensor cosines = with_dense_last(cos), sines = with_dense_last(sin);
  Tensor q_out = empty_in_order_of(q), k_out = empty_in_order_of(k);

  const int64_t width = cos.size(2), positions = q.size(2), tokens = q.size(0) * positions;
  const int64_t bytes = q.element_size(), run = (interleaved ? width : width / 2) * bytes;
  const bool stream = width == q.size(3) && streams(q.numel() * bytes, q_out.data_ptr(), run) &&
                      reinterpret_cast<uintptr_t>(k_out.data_ptr()) % 64 == 0;
  const Turn turn{cosines.data_ptr(),
                  sines.data_ptr(),
                  row_stride(cosines),
                  cosines.stride(1),
                  row_stride(sines),
                  sines.stride(1),
                  positions,
                  width,
                  interleaved,
                  transposed,
                  stream};
  const Heads q_heads = heads_of(queries, q_out), k_heads = heads_of(keys, k_out);
  const ScalarType dtype = q.scalar_type(), factors = cos.scalar_type();
  const Kernel kernel = dtype == ScalarType::Float      ? kernel_of<float>(factors)
                        : dtype == ScalarType::BFloat16 ? kernel_of<BFloat16>(factors)
                                                        : kernel_of<Half>(factors);
  const int64_t of_token = std::max<int64_t>(1, (q.size(1) + k.size(1)) * q.size(3));
  torch::stable::parallel_for(0, tokens, std::max<int64_t>(1, kGrain / of_token), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(2 * (width + 64));
    kernel(turn, q_heads, k_heads, scratch.data(), begin, end);
  });
  return {q_out, k_out};
}

}  // namespace
}  // namespace fastppo

// x cos + turned(x) sin for q (rows, heads, positions, width) and k (rows, kv heads, positions, width), fp32, bf16 or
// fp16, with cos and sin (rows or 1, positions, R), of any of these dtypes, R <= width even; numbers past R are copied.
// turned(x) = (-x2, x1) with the halves x1, x2 of the first R numbers; interleaved: (-x[1], x[0], -x[3], x[2], ...).
// transposed: the transposed map, which is that of the gradients. fp32 inside, rounded once. The outputs are dense,
// positions outside of heads or inside as in the inputs.
STABLE_TORCH_LIBRARY_FRAGMENT(fastppo, m) {
  m.def(
      "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool transposed)"
      " -> (Tensor q, Tensor k)");
}

STABLE_TORCH_LIBRARY_IMPL(fastppo, CPU, m) { m.impl("rotary", TORCH_BOX(&fastppo::rotary)); }
