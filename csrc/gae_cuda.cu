// fastppo::gae on CUDA: checks, allocates, launches. The schema is in gae.cpp, the kernels are in gae_kernels.cuh.
#include "gae_arguments.h"
#include "gae_kernels.cuh"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <limits>

namespace fastppo {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Working memory from torch's allocator, on the current stream; freed with the tensor.
Tensor bytes_like(const Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, {count}, ScalarType::Byte);
}

template <typename T>
void launch(const gae::Arguments& arguments, float* advantages, cudaStream_t stream) {
  const auto data = [](const std::optional<Tensor>& x) { return x.has_value() ? x->data_ptr() : nullptr; };
  const int64_t tokens = arguments.tokens();
  cuda::Call<T> call{};
  call.arrays = {static_cast<const T*>(arguments.rewards.data_ptr()),
                 static_cast<const T*>(arguments.values.data_ptr()),
                 static_cast<const uint8_t*>(data(arguments.mask)),
                 advantages,
                 advantages + tokens,
                 tokens};
  call.discount = cuda::discount_of(arguments.gamma, arguments.lam);
  call.cu_seqlens = arguments.cu_seqlens.data_ptr();
  call.wide = arguments.cu_seqlens.scalar_type() == ScalarType::Long;
  call.bootstrap = static_cast<const float*>(data(arguments.bootstrap));
  call.sequences = arguments.sequences();

  const int64_t slots = tokens > cuda::kBlockTokens ? cuda::slots_of(tokens) : 0;
  const Tensor summaries = bytes_like(arguments.rewards, slots * sizeof(float4));
  const Tensor counts = bytes_like(arguments.rewards, slots * sizeof(int));
  const Tensor carries = bytes_like(arguments.rewards, slots * sizeof(float2));
  call.summaries = static_cast<float4*>(summaries.data_ptr());
  call.counts = static_cast<int*>(counts.data_ptr());
  call.carries = static_cast<float2*>(carries.data_ptr());

  cuda::launch_all(call, [&](auto kernel, int64_t blocks, int threads) {
    REQUIRE(blocks <= std::numeric_limits<int>::max(), "rewards and cu_seqlens ask for ", blocks,
            " blocks; a CUDA grid has at most 2147483647");
    kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(call);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

Tensor run_gae(const Tensor& rewards, const Tensor& values, const Tensor& cu_seqlens, double gamma, double lam,
               const std::optional<Tensor>& bootstrap, const std::optional<Tensor>& mask) {
  const gae::Arguments arguments{rewards, values, cu_seqlens, gamma, lam, bootstrap, mask};
  arguments.check();
  REQUIRE(arguments.sequences() > 0 || arguments.tokens() == 0, "cu_seqlens has no sequence, and rewards ",
          arguments.tokens(), " tokens");
  const torch::stable::accelerator::DeviceGuard guard(rewards.get_device_index());
  Tensor out = torch::stable::new_empty(rewards, {2, arguments.tokens()}, ScalarType::Float);
  if (arguments.sequences() == 0) return out;
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(rewards.get_device_index(), &stream));
  const auto run = rewards.scalar_type() == ScalarType::Float ? &launch<float> : &launch<uint16_t>;
  run(arguments, static_cast<float*>(out.data_ptr()), static_cast<cudaStream_t>(stream));
  return out;
}

}  // namespace
}  // namespace fastppo

STABLE_TORCH_LIBRARY_IMPL(fastppo, CUDA, m) { m.impl("gae", TORCH_BOX(&fastppo::run_gae)); }
