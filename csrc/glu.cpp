// fastppo::swiglu and geglu, and their gradients: an activation of the gate times the up projection (Shazeer, 2020), on
// the CPU.
#include "checks.h"
#include "layer_rows.h"
#include "simd.h"
#include "streams.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

namespace fastppo {
namespace {

enum class Activation { silu, gelu, gelu_tanh };

#define BODY "glu.inc"
#include "levels.inc"

constexpr int64_t kBlock = 4096;   // numbers of a work item
constexpr int64_t kGrain = 16384;  // numbers for which waking a thread pays off

Activation activation_of(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  REQUIRE(name == "gelu_tanh", "activation is '", name, "', expected 'silu', 'gelu' or 'gelu_tanh'");
  return Activation::gelu_tanh;
}

// The rows of gate and up, or of both joined.
struct Inputs {
  LayerRows gate, up;
  int64_t width, up_offset;  // where up begins in its rows, in bytes
  std::vector<int64_t> sizes;

  Inputs(const Tensor& gates, const std::optional<Tensor>& ups)
      : gate(layer_rows(gates)),
        up(ups ? layer_rows(*ups) : gate),
        width(gate.width),
        up_offset(0),
        sizes(gates.sizes().vec()) {
    if (ups) return;
    width = sizes.back() /= 2;
    up_offset = width * static_cast<int64_t>(gates.element_size());
  }
};

void check(const Tensor& gate, const std::optional<Tensor>& up) {
  require_floating(gate, "gate");
  REQUIRE(gate.dim() > 0, "gate has shape (), expected (..., width)");
  if (up) return require_same_shape(*up, "up", gate, "gate");
  REQUIRE(gate.size(gate.dim() - 1) % 2 == 0, "gate has shape ", shape(gate),
          ", expected (..., 2 width): the gate's columns and those of up");
}

bool follow_each_other(const LayerRows& x, int64_t row_bytes) { return x.rows <= 1 || (x.flat && x.step == row_bytes); }

// Calls run(row, column, count) for blocks of rows; of one long row if all of them follow each other.
template <typename Run>
void for_blocks(int64_t rows, int64_t width, bool dense, const Run& run) {
  if (dense) width *= rows, rows = 1;
  if (width == 0) return;
  const int64_t of_row = (width + kBlock - 1) / kBlock;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::min(width, kBlock));
  torch::stable::parallel_for(0, rows * of_row, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / of_row, column = item % of_row * kBlock;
      run(row, column, std::min(kBlock, width - column));
    }
  });
}

using Forward = void (*)(const void*, const void*, void*, int64_t, bool);
using Backward = void (*)(const void*, const void*, const void*, void*, void*, int64_t, bool);

template <typename T>
Forward forward_of(Activation kind) {
  return kind == Activation::silu   ? AT_LEVEL(glu_row<T, Activation::silu>)
         : kind == Activation::gelu ? AT_LEVEL(glu_row<T, Activation::gelu>)
                                    : AT_LEVEL(glu_row<T, Activation::gelu_tanh>);
}

template <typename T>
Backward backward_of(Activation kind) {
  return kind == Activation::silu   ? AT_LEVEL(glu_row_backward<T, Activation::silu>)
         : kind == Activation::gelu ? AT_LEVEL(glu_row_backward<T, Activation::gelu>)
                                    : AT_LEVEL(glu_row_backward<T, Activation::gelu_tanh>);
}

Tensor glu(const Tensor& gates, const std::optional<Tensor>& ups, Activation kind) {
  check(gates, ups);
  const Inputs in(gates, ups);
  const ScalarType dtype = gates.scalar_type();
  const int64_t bytes = gates.element_size(), row_bytes = in.width * bytes;
  const auto run = dtype == ScalarType::Float      ? forward_of<float>(kind)
                   : dtype == ScalarType::BFloat16 ? forward_of<BFloat16>(kind)
                                                   : forward_of<Half>(kind);
  Tensor out = torch::stable::new_empty(gates, in.sizes);
  char* const to = static_cast<char*>(out.data_ptr());
  const bool dense = follow_each_other(in.gate, row_bytes) && follow_each_other(in.up, row_bytes);
  const bool stream = streams(in.gate.rows * row_bytes, to, row_bytes);
  for_blocks(in.gate.rows, in.width, dense, [&](int64_t row, int64_t column, int64_t count) {
    const int64_t offset = column * bytes;
    run(in.gate.at(row) + offset, in.up.at(row) + in.up_offset + offset, to + row * row_bytes + offset, count, stream);
  });
  return out;
}

Tensor swiglu(const Tensor& gate, const std::optional<Tensor>& up) { return glu(gate, up, Activation::silu); }

Tensor geglu(const Tensor& gate, const std::optional<Tensor>& up, const std::string& approximate) {
  REQUIRE(approximate == "none" || approximate == "tanh", "approximate is '", approximate,
          "', expected 'none' or 'tanh'");
  return glu(gate, up, approximate == "tanh" ? Activation::gelu_tanh : Activation::gelu);
}

Tensor glu_backward(const Tensor& grad, const Tensor& gates, const std::optional<Tensor>& ups,
                    const std::string& activation) {
  const Activation kind = activation_of(activation);
  check(gates, ups);
  const Inputs in(gates, ups);
  const ScalarType dtype = gates.scalar_type();
  require_dtype(grad, "grad", dtype);
  require_shape(grad, "grad", in.sizes);
  const int64_t bytes = gates.element_size(), rows = in.gate.rows, row_bytes = in.width * bytes;
  const auto run = dtype == ScalarType::Float      ? backward_of<float>(kind)
                   : dtype == ScalarType::BFloat16 ? backward_of<BFloat16>(kind)
                                                   : backward_of<Half>(kind);
  std::vector<int64_t> sizes = gates.sizes().vec();
  if (ups) sizes.insert(sizes.begin(), 2);
  Tensor out = torch::stable::new_empty(gates, sizes);
  char* const d_gate = static_cast<char*>(out.data_ptr());
  char* const d_up = d_gate + (ups ? rows * row_bytes : row_bytes);
  const int64_t step = ups ? row_bytes : 2 * row_bytes;
  const LayerRows upstream = layer_rows(grad);
  const bool dense = ups && follow_each_other(in.gate, row_bytes) && follow_each_other(in.up, row_bytes) &&
                     follow_each_other(upstream, row_bytes);
  const bool stream = streams(2 * rows * row_bytes, d_gate, row_bytes);
  for_blocks(rows, in.width, dense, [&](int64_t row, int64_t column, int64_t count) {
    const int64_t offset = column * bytes;
    run(upstream.at(row) + offset, in.gate.at(row) + offset, in.up.at(row) + in.up_offset + offset,
        d_gate + row * step + offset, d_up + row * step + offset, count, stream);
  });
  return out;
}

}  // namespace
}  // namespace fastppo

// swiglu: silu(gate) up, (..., width); geglu: gelu(gate) up, approximate: none or tanh. Without up, gate is
// (..., 2 width), and its second half up. fp32, bf16 or fp16, both the same; fp32 inside, rounded once. The rows may
// lie apart. glu_backward, activation silu, gelu or gelu_tanh: d_gate and d_up, as one tensor (2, ..., width); without
// up, as the halves of (..., 2 width).
STABLE_TORCH_LIBRARY_FRAGMENT(fastppo, m) {
  m.def("swiglu(Tensor gate, Tensor? up) -> Tensor");
  m.def("geglu(Tensor gate, Tensor? up, str approximate) -> Tensor");
  m.def("glu_backward(Tensor grad, Tensor gate, Tensor? up, str activation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastppo, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&fastppo::swiglu));
  m.impl("geglu", TORCH_BOX(&fastppo::geglu));
  m.impl("glu_backward", TORCH_BOX(&fastppo::glu_backward));
}
