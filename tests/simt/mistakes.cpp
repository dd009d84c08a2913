// Kernels with a planted mistake each, to prove that simt.h stops at it: `mistakes NAME`.
#include <vector>

namespace {

int finished = 0;

void reads_past_the_end(const float* numbers) { __ldg(numbers + 32 + threadIdx.x); }

void reads_between_the_lines(const float* numbers) { __ldg(reinterpret_cast<const float4*>(numbers + 1)); }

void half_a_warp_shuffles(const float* numbers) {
  if (threadIdx.x < 16) __shfl_sync(0xffffffffu, *numbers, 0);
}

void one_warp_waits_in_vain(const float*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else if (threadIdx.x < 40) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

void waits_for_a_later_block(const float*) {
  if (blockIdx.x == 0) {
    while (__atomic_load_n(&finished, __ATOMIC_RELAXED) == 0) __nanosleep(1);
  }
  __syncthreads();
  if (threadIdx.x == 0) __atomic_store_n(&finished, 1, __ATOMIC_RELAXED);
}

void makes_none(const float* numbers) {
  __ldg(numbers + threadIdx.x % 32);
  __syncthreads();
}

}  // namespace

int main(int, char** arguments) {
  const std::vector<float> numbers(64);
  simt::allow(numbers.data(), 32 * sizeof(float));
  const struct {
    const char* name;
    void (*kernel)(const float*);
  } kernels[] = {{"bounds", reads_past_the_end},     {"alignment", reads_between_the_lines},
                 {"shuffle", half_a_warp_shuffles},  {"barrier", one_warp_waits_in_vain},
                 {"block", waits_for_a_later_block}, {"none", makes_none}};
  for (const auto& [name, kernel] : kernels) {
    if (std::strcmp(name, arguments[1]) == 0) simt::run({4, 64}, [&] { kernel(numbers.data()); });
  }
}
