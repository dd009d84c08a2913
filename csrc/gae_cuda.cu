// fastppo::gae on CUDA: checks, allocates, launches. The schema is in gae.cpp, the kernel is in gae_kernels.cuh.
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

  call.blocks = cuda::blocks_of(tokens);
  call.checked = (call.sequences + call.blocks - 1) / call.blocks;
  REQUIRE(call.blocks <= std::numeric_limits<int>::max(), "rewards asks for ", call.blocks,
          " blocks; a CUDA grid has at most 2147483647");

  // Working memory from torch's allocator, on the current stream; freed with the tensor.
  const int64_t bytes = call.blocks > 1 ? call.blocks * sizeof(cuda::Message) + sizeof(int) : 0;
  const Tensor memory = torch::stable::new_empty(arguments.rewards, {bytes}, ScalarType::Byte);
  if (bytes > 0) {
    STD_CUDA_CHECK(cudaMemsetAsync(memory.data_ptr(), 0, bytes, stream));
    call.messages = static_cast<cuda::Message*>(memory.data_ptr());
    call.begun = reinterpret_cast<int*>(call.messages + call.blocks);
  }

  cuda::launch_once(call, [&](auto kernel, int64_t blocks, int threads) {
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
