// csrc/gae_kernels.cuh on the CPU, for tests/ops/test_gae_kernels.py.
#include "gae_kernels.cuh"

#include <vector>

namespace {

using namespace fastppo::cuda;

struct Request {  // as the Structure of the test
  const void *rewards, *values, *cu_seqlens, *bootstrap, *mask;
  float *advantages, *returns;
  int64_t tokens, sequences;
  double gamma, lam;
  int32_t bf16, wide, backwards;
};

template <typename T>
void run(const Request& request) {
  Call<T> call{};
  const int64_t tokens = request.tokens;
  call.arrays = {static_cast<const T*>(request.rewards),
                 static_cast<const T*>(request.values),
                 static_cast<const uint8_t*>(request.mask),
                 request.advantages,
                 request.returns,
                 tokens};
  call.discount = discount_of(request.gamma, request.lam);
  call.cu_seqlens = request.cu_seqlens;
  call.wide = request.wide != 0;
  call.bootstrap = static_cast<const float*>(request.bootstrap);
  call.sequences = request.sequences;

  const int64_t slots = slots_of(tokens);
  std::vector<float4> summaries(slots);
  std::vector<int> counts(slots);
  std::vector<float2> carries(slots);
  call.summaries = summaries.data();
  call.counts = counts.data();
  call.carries = carries.data();

  simt::allow_nothing();
  for (const void* x : {request.rewards, request.values}) simt::allow(x, tokens * sizeof(T));
  for (const void* x : {request.advantages, request.returns}) simt::allow(x, tokens * sizeof(float));
  simt::allow(request.cu_seqlens, (request.sequences + 1) * (call.wide ? 8 : 4));
  if (request.bootstrap != nullptr) simt::allow(request.bootstrap, request.sequences * sizeof(float));
  if (request.mask != nullptr) simt::allow(request.mask, tokens);
  simt::allow(call.summaries, slots * sizeof(float4));
  simt::allow(call.counts, slots * sizeof(int));
  simt::allow(call.carries, slots * sizeof(float2));
  launch_all(call, [&](auto kernel, int64_t blocks, int threads) {
    simt::run(blocks, threads, request.backwards != 0, [&] { kernel(call); });
  });
}

}  // namespace

extern "C" simt::Traffic gae(const Request* request) {
  const simt::Traffic before = simt::traffic();
  request->bf16 != 0 ? run<uint16_t>(*request) : run<float>(*request);
  const simt::Traffic after = simt::traffic();
  return {after.read - before.read, after.written - before.written};
}
