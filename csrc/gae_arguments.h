// The arguments of the kernels of fastppo::gae, checked without reading values of tensors.
#pragma once

#include "checks.h"

#include <optional>

namespace fastppo::gae {

struct Arguments {
  const Tensor &rewards, &values, &cu_seqlens;
  double gamma, lam;
  const std::optional<Tensor>&bootstrap, &mask;

  int64_t tokens() const { return rewards.size(0); }
  int64_t sequences() const { return cu_seqlens.size(0) - 1; }

  void check() const {
    const ScalarType dtype = rewards.scalar_type();
    REQUIRE(rewards.dim() == 1, "rewards has shape ", shape(rewards), "; expected one dimension, (M,)");
    REQUIRE(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "rewards must be float32 or bfloat16");
    REQUIRE(gamma >= 0.0 && gamma <= 1.0, "gamma is ", gamma, "; it must be in [0, 1]");
    REQUIRE(lam >= 0.0 && lam <= 1.0, "lam is ", lam, "; it must be in [0, 1]");
    check_row(rewards, "rewards", tokens(), dtype, "(M,)");
    check_row(values, "values", tokens(), dtype, "one number for each row of rewards, in the dtype of rewards");
    REQUIRE(cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0, "cu_seqlens has shape ", shape(cu_seqlens),
            "; expected (B+1,)");
    const ScalarType starts = cu_seqlens.scalar_type() == ScalarType::Int ? ScalarType::Int : ScalarType::Long;
    check_row(cu_seqlens, "cu_seqlens", sequences() + 1, starts, "int32 or int64");
    if (bootstrap.has_value()) {
      check_row(*bootstrap, "bootstrap", sequences(), ScalarType::Float, "one float32 for each sequence of cu_seqlens");
    }
    if (mask.has_value()) check_row(*mask, "mask", tokens(), ScalarType::Bool, "one bool for each row of rewards");
  }

 private:
  void check_row(const Tensor& x, const char* name, int64_t length, ScalarType dtype, const char* meaning) const {
    REQUIRE(x.device() == rewards.device(), name, " is not on the device of rewards");
    REQUIRE(x.dim() == 1 && x.size(0) == length, name, " has shape ", shape(x), "; expected (", length,
            ",): ", meaning);
    REQUIRE(x.scalar_type() == dtype, name, " has a wrong dtype; expected ", meaning);
    REQUIRE(x.is_contiguous(), name, " must be contiguous");
  }
};

}  // namespace fastppo::gae
