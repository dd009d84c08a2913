// Checks of arguments, shared by the ops. A message has the argument, its value and the allowed values.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastppo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());  // a ValueError in Python
}

// The message is built only if the condition is false, because some ops run once for each layer and token.
#define REQUIRE(condition, ...) \
  if (!(condition)) ::fastppo::fail(__VA_ARGS__)

inline std::string shape(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::ostringstream text;
  text << '(';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << (sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

inline std::string shape(const Tensor& x) { return shape(x.sizes()); }

inline const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

inline void require_shape(const Tensor& x, const char* name, const std::vector<int64_t>& expected) {
  REQUIRE(x.sizes().equals(expected), name, " has shape ", shape(x), ", expected ", shape(expected));
}

inline void require_dtype(const Tensor& x, const char* name, ScalarType dtype) {
  REQUIRE(x.scalar_type() == dtype, name, " has dtype ", name_of(x.scalar_type()), ", expected ", name_of(dtype));
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

inline void require_floating(const Tensor& x, const char* name) {
  REQUIRE(is_floating(x.scalar_type()), name, " has dtype ", name_of(x.scalar_type()),
          ", expected float32, bfloat16 or float16");
}

// Rows that are written must not share memory, and must be dense in the last dimension.
inline void require_writable_rows(const Tensor& x, const char* name) {
  const int64_t rows = x.size(0), width = x.size(1);
  REQUIRE(width <= 1 || x.stride(1) == 1, name, " must be dense in its last dimension; its stride there is ",
          x.stride(1));
  REQUIRE(rows <= 1 || x.stride(0) >= width || x.stride(0) <= -width, name, " has rows of ", width,
          " entries, and only ", x.stride(0), " between one row and the next");
}

}  // namespace fastppo
