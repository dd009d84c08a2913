// fastppo::accumulate: adds a matrix in fp32 or half precision to an fp32 matrix, on the CPU.
#include "checks.h"
#include "simd.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace fastppo {
namespace {

#define BODY "accumulate.inc"
#include "levels.inc"

void accumulate(const Tensor& total, const Tensor& part) {
  REQUIRE(total.dim() == 2, "total has shape ", shape(total), ", expected (rows, width)");
  const int64_t rows = total.size(0), width = total.size(1);
  require_dtype(total, "total", ScalarType::Float);
  require_writable_rows(total, "total");
  require_floating(part, "part");
  require_shape(part, "part", {rows, width});
  const Tensor dense = width <= 1 || part.stride(1) == 1 ? part : torch::stable::contiguous(part);

  const auto add_row = part.scalar_type() == ScalarType::Float      ? AT_LEVEL(add_row<float>)
                       : part.scalar_type() == ScalarType::BFloat16 ? AT_LEVEL(add_row<BFloat16>)
                                                                    : AT_LEVEL(add_row<Half>);
  float* const to = total.mutable_data_ptr<float>();
  const char* const from = static_cast<const char*>(dense.data_ptr());
  const int64_t stride = total.stride(0), bytes = dense.stride(0) * static_cast<int64_t>(dense.element_size());
  const int64_t grain = std::max<int64_t>(1, 30'000 / std::max<int64_t>(1, width));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) add_row(to + row * stride, from + row * bytes, width);
  });
}

}  // namespace
}  // namespace fastppo

// total (rows, width) fp32 += part (rows, width) fp32, bf16 or fp16; total is dense in its last dimension.
STABLE_TORCH_LIBRARY_FRAGMENT(fastppo, m) { m.def("accumulate(Tensor(a!) total, Tensor part) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(fastppo, CPU, m) { m.impl("accumulate", TORCH_BOX(&fastppo::accumulate)); }
