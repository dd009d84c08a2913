// fastppo::rms_norm and rms_norm_backward: RMSNorm with the sum of a residual before it, on the CPU.
#include "layer_rows.h"
#include "simd.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <type_traits>

namespace fastppo {
namespace {

struct Norm {
  LayerRows x;
  const LayerRows* residual;
  const float* scale;  // offset + weight, in the order of pairs, see pairs.inc
  bool finite;         // all of them
  void *y, *total;     // dense
  float eps;
};

struct NormGradient {
  LayerRows d_y, x;
  const LayerRows* d_total;
  const float* scale;
  void* d_x;  // dense
  float eps;
};

#define BODY "rms_norm.inc"
#include "levels.inc"

// Calls f with a number of the element type of `dtype`.
template <typename F>
auto with_type(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Float) return f(float{});
  if (dtype == ScalarType::Half) return f(Half{});
  return f(BFloat16{});
}

// Calls f with both conditions as types.
template <typename F>
auto with_conditions(bool first, bool second, const F& f) {
  if (first) return second ? f(std::true_type{}, std::true_type{}) : f(std::true_type{}, std::false_type{});
  return second ? f(std::false_type{}, std::true_type{}) : f(std::false_type{}, std::false_type{});
}

constexpr int64_t kLargestPair = 32;  // numbers that are loaded at once, at most

int64_t padded_to_pairs(int64_t width) { return (width + kLargestPair - 1) / kLargestPair * kLargestPair; }

struct Scale {
  std::unique_ptr<float[]> values;
  bool finite;
};

Scale scale_of(const Tensor& weight, double offset, ScalarType rows) {
  const Tensor dense = torch::stable::contiguous(weight);
  const int64_t width = weight.size(0);
  std::unique_ptr<float[]> values(new float[padded_to_pairs(width)]);
  const auto widen = with_type(rows, [&](auto t) {
    return with_type(weight.scalar_type(), [](auto w) { return AT_LEVEL(widen_weight<decltype(t), decltype(w)>); });
  });
  const bool finite = widen(dense.data_ptr(), static_cast<float>(offset), values.get(), width);
  return {std::move(values), finite};
}

void check_arguments(const Tensor& x, const Tensor& weight, double eps, double offset) {
  require_floating(x, "x");
  REQUIRE(x.dim() > 0 && x.size(x.dim() - 1) > 0, "x has shape ", shape(x), ", expected (..., H)");
  require_floating(weight, "weight");
  require_shape(weight, "weight", {x.size(x.dim() - 1)});
  REQUIRE(eps >= 0 && std::isfinite(eps), "eps is ", eps, ", expected a number of at least 0");
  REQUIRE(std::isfinite(offset), "offset is ", offset, ", expected a number");
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps,
                                    const std::optional<Tensor>& residual, double offset, bool round_first) {
  check_arguments(x, weight, eps, offset);
  if (residual) require_same_shape(*residual, "residual", x, "x");
  Tensor y = torch::stable::new_empty(x, x.sizes());
  Tensor total = residual ? torch::stable::new_empty(x, x.sizes()) : torch::stable::new_empty(x, {0});
  const Scale scale = scale_of(weight, offset, x.scalar_type());
  std::optional<LayerRows> added;
  if (residual) added = layer_rows(*residual);
  const Norm norm{layer_rows(x), added ? &*added : nullptr, scale.values.get(),     scale.finite,
                  y.data_ptr(),  total.data_ptr(),          static_cast<float>(eps)};
  const auto run = with_type(x.scalar_type(), [&](auto t) {
    return with_conditions(residual.has_value(), round_first, [](auto add, auto round) {
      return AT_LEVEL(norm_rows<decltype(t), decltype(add)::value, decltype(round)::value>);
    });
  });
  torch::stable::parallel_for(0, norm.x.rows, row_grain(norm.x.width),
                              [&](int64_t begin, int64_t end) { run(norm, begin, end); });
  return {y, total};
}

// Rows whose part of d_weight is summed by itself: the same ones for any number of threads.
int64_t rows_of_part(int64_t rows) { return std::max<int64_t>(16, (rows + 63) / 64); }

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& d_y, const std::optional<Tensor>& d_total, const Tensor& x,
                                             const Tensor& weight, double eps, double offset, bool weight_wanted) {
  check_arguments(x, weight, eps, offset);
  require_same_shape(d_y, "d_y", x, "x");
  if (d_total) require_same_shape(*d_total, "d_total", x, "x");
  Tensor d_x = torch::stable::new_empty(x, x.sizes());
  const int64_t width = x.size(x.dim() - 1);
  Tensor d_weight = torch::stable::new_empty(weight, {weight_wanted ? width : 0});
  const Scale scale = scale_of(weight, offset, x.scalar_type());
  std::optional<LayerRows> of_total;
  if (d_total) of_total = layer_rows(*d_total);
  const NormGradient norm{layer_rows(d_y),    layer_rows(x),  of_total ? &*of_total : nullptr,
                          scale.values.get(), d_x.data_ptr(), static_cast<float>(eps)};
  const auto run = with_type(x.scalar_type(), [&](auto t) {
    return with_conditions(d_total.has_value(), weight_wanted, [](auto sum, auto weight) {
      return AT_LEVEL(differentiate_rows<decltype(t), decltype(sum)::value, decltype(weight)::value>);
    });
  });

  const int64_t rows = norm.x.rows, together = rows_of_part(rows), parts = (rows + together - 1) / together;
  const int64_t padded = padded_to_pairs(width);
  const std::unique_ptr<float[]> sums(weight_wanted ? new float[parts * padded] : nullptr);
  const int64_t grain = std::max<int64_t>(1, row_grain(width) / together);
  torch::stable::parallel_for(0, parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      float* const sum = weight_wanted ? sums.get() + part * padded : nullptr;
      if (sum) std::fill_n(sum, padded, 0.0f);
      run(norm, part * together, std::min(rows, (part + 1) * together), sum);
    }
  });
  if (weight_wanted) {
    const auto add = with_type(x.scalar_type(), [&](auto t) {
      return with_type(weight.scalar_type(), [](auto w) { return AT_LEVEL(add_parts<decltype(t), decltype(w)>); });
    });
    const int64_t blocks = padded / kLargestPair, least = std::max<int64_t>(1, 4'000 / (parts + 1));
    torch::stable::parallel_for(0, blocks, least, [&](int64_t begin, int64_t end) {
      const int64_t last = std::min(width, end * kLargestPair);
      add(sums.get(), parts, padded, d_weight.data_ptr(), width, begin * kLargestPair, last);
    });
  }
  return {d_x, d_weight};
}

}  // namespace
}  // namespace fastppo

// x (..., H) fp32, bf16 or fp16, of any strides; residual of the same shape and dtype; weight (H,) fp32, bf16 or fp16.
// With s = x + residual, rounded to the dtype of x, or s = x:
//   y (..., H) = s / sqrt(mean(s^2) + eps) (offset + weight), dense, in the dtype of x; with round_first the quotient
//   is rounded before it is multiplied. The second result is s, or empty without a residual. d_x (..., H) = d loss / d
//   s, which is the gradient of x and of the residual, given those by y and, unless d_total is None, by s; here x is s.
//   d_weight (H,) in the dtype of weight, or empty if it is not wanted; its sums over rows are fp32, in fixed order.
// Results of a row do not depend on other rows.
STABLE_TORCH_LIBRARY_FRAGMENT(fastppo, m) {
  m.def(
      "rms_norm(Tensor x, Tensor weight, float eps, Tensor? residual, float offset, bool round_first)"
      " -> (Tensor, Tensor)");
  m.def(
      "rms_norm_backward(Tensor d_y, Tensor? d_total, Tensor x, Tensor weight, float eps, float offset, "
      "bool weight_wanted) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastppo, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&fastppo::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&fastppo::rms_norm_backward));
}
