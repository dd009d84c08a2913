// CUDA's words for a kernel that runs on the CPU: a block's threads are fibers that take turns on one thread of the
// machine, one block after another. Include it before the kernel (g++ -include simt.h).
//
// Barriers order memory and shuffles do not, as on a GPU: under -fsanitize=thread each fiber is a thread of its own,
// and a missing barrier is a data race, found whatever the order in which fibers happen to run. simt.cpp, which makes
// them take turns, is compiled without the sanitizer, so that its own bookkeeping counts for nothing. Reads and writes
// of global memory go through __ldg, __ldcs, __ldcg, __stcs and __stcg: they are counted, and must be aligned and
// inside of a buffer that `simt::allow` named.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())

struct Index {
  unsigned x;
};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace simt {

Index thread_index();
Index block_index();

// Runs `thread` once for each thread of each block; blocks from the last to the first if `backwards`.
void run(int64_t blocks, int threads, bool backwards, const std::function<void()>& thread);

struct Traffic {
  int64_t read, written;
};
Traffic traffic();  // bytes since the start of the program
void allow(const void* begin, int64_t bytes);
void allow_nothing();

void count(const void* address, int64_t bytes, bool written);  // stops the program where a GPU would fault
void block_barrier();
void warp_barrier(unsigned lanes);
// Each lane gives a value and gets that of another, or of itself.
uint64_t exchange(unsigned lanes, uint64_t value, int from_lane);
unsigned ballot(unsigned lanes, bool vote);
int lane();

template <typename T>
T read(const T* address) {
  count(address, sizeof(T), false);
  T value;
  std::memcpy(&value, address, sizeof(T));
  return value;
}

template <typename T>
void write(T* address, T value) {
  count(address, sizeof(T), true);
  std::memcpy(address, &value, sizeof(T));
}

template <typename T>
T shuffle(unsigned lanes, T value, int from_lane) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(lanes, bits, from_lane);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __ffs(unsigned bits) { return bits == 0 ? 0 : std::countr_zero(bits) + 1; }

inline void __syncthreads() { simt::block_barrier(); }
inline void __syncwarp(unsigned lanes = 0xffffffffu) { simt::warp_barrier(lanes); }
inline unsigned __ballot_sync(unsigned lanes, bool vote) { return simt::ballot(lanes, vote); }

template <typename T>
T __shfl_sync(unsigned lanes, T value, int from_lane) {
  return simt::shuffle(lanes, value, from_lane & 31);
}
template <typename T>
T __shfl_down_sync(unsigned lanes, T value, unsigned distance) {
  const int from = simt::lane() + static_cast<int>(distance);
  return simt::shuffle(lanes, value, from < 32 ? from : simt::lane());
}

template <typename T>
T __ldg(const T* address) {
  return simt::read(address);
}
template <typename T>
T __ldcs(const T* address) {
  return simt::read(address);
}
template <typename T>
T __ldcg(const T* address) {
  return simt::read(address);
}
template <typename T>
void __stcs(T* address, T value) {
  simt::write(address, value);
}
template <typename T>
void __stcg(T* address, T value) {
  simt::write(address, value);
}
