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
  int32_t bf16, wide, backwards, places, seed;
};

int64_t launches = 0;

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

  call.blocks = blocks_of(tokens);
  call.checked = (call.sequences + call.blocks - 1) / call.blocks;
  std::vector<Message> messages(call.blocks);
  int begun = 0;
  call.messages = messages.data();
  call.begun = &begun;

  simt::allow_nothing();
  for (const void* x : {request.rewards, request.values}) simt::allow(x, tokens * sizeof(T));
  for (const void* x : {request.advantages, request.returns}) simt::allow(x, tokens * sizeof(float));
  simt::allow(request.cu_seqlens, (request.sequences + 1) * (call.wide ? 8 : 4));
  if (request.bootstrap != nullptr) simt::allow(request.bootstrap, request.sequences * sizeof(float));
  if (request.mask != nullptr) simt::allow(request.mask, tokens);
  simt::allow(call.messages, call.blocks * sizeof(Message));
  simt::allow(call.begun, sizeof(int));
  launch_once(call, [&](auto kernel, int64_t blocks, int threads) {
    ++launches;
    simt::run({blocks, threads, request.backwards != 0, request.places, static_cast<uint64_t>(request.seed)},
              [&] { kernel(call); });
  });
}

}  // namespace

struct Used {  // as the Structure of the test
  int64_t read, written, launches;
};

extern "C" Used gae(const Request* request) {
  const simt::Traffic before = simt::traffic();
  launches = 0;
  request->bf16 != 0 ? run<uint16_t>(*request) : run<float>(*request);
  const simt::Traffic after = simt::traffic();
  return {after.read - before.read, after.written - before.written, launches};
}
