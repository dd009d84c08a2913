// Rows of a layer's tensors: (..., H) of any strides, read without a copy wherever two strides describe the rows.
#pragma once

#include "checks.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <memory>

namespace fastppo {

// Row m starts m / inner * outer + m % inner * step bytes after the first one; its columns are adjacent.
struct LayerRows {
  Tensor tensor;  // keeps the memory alive
  char* data;
  int64_t rows, width, inner, outer, step;
  bool flat;  // `step` alone describes the rows

  char* at(int64_t row) const { return data + (flat ? row * step : row / inner * outer + row % inner * step); }
};

// Strides of the leading dimensions of x as two: of those before the last but one together, and of the last but one.
inline bool in_two_strides(const Tensor& x, int64_t& outer) {
  const int64_t leading = x.dim() - 2;
  int64_t span = 0;  // the stride that the next dimension to the left needs
  outer = 0;
  for (int64_t i = leading - 1; i >= 0; --i) {
    if (x.size(i) == 1) continue;
    if (span != 0 && x.stride(i) != span) return false;
    if (span == 0) outer = x.stride(i);
    span = x.stride(i) * x.size(i);
  }
  return true;
}

// The rows of x, which has one dimension or more, or of a dense copy of it.
inline LayerRows layer_rows(const Tensor& x) {
  const int64_t dims = x.dim(), width = x.size(dims - 1), inner = dims > 1 ? x.size(dims - 2) : 1;
  const int64_t bytes = static_cast<int64_t>(x.element_size()), rows = width == 0 ? 0 : x.numel() / width;
  int64_t outer = 0;
  const bool in_place = (width <= 1 || x.stride(dims - 1) == 1) && (dims <= 2 || in_two_strides(x, outer));
  if (rows > 0 && !in_place) {  // `contiguous` leaves the strides of an empty tensor as they are
    return layer_rows(torch::stable::contiguous(x));
  }
  int64_t step = dims > 1 ? x.stride(dims - 2) : width;
  if (inner <= 1) step = outer;
  const bool flat = inner <= 1 || rows == inner || outer == inner * step;
  return {x, static_cast<char*>(x.data_ptr()), rows, width, inner, outer * bytes, step * bytes, flat};
}

inline void require_same_shape(const Tensor& x, const char* name, const Tensor& like, const char* like_name) {
  REQUIRE(x.sizes().equals(like.sizes()), name, " has shape ", shape(x), ", expected ", shape(like), ", that of ",
          like_name);
  REQUIRE(x.scalar_type() == like.scalar_type(), name, " has dtype ", name_of(x.scalar_type()), ", expected ",
          name_of(like.scalar_type()), ", that of ", like_name);
}

// Rows for one thread: waking another one pays off for about 10 us of work, which is about 30,000 numbers.
inline int64_t row_grain(int64_t width) { return std::max<int64_t>(1, 30'000 / std::max<int64_t>(1, width)); }

}  // namespace fastppo
