// CUDA's words for a kernel that runs on the CPU: a block's threads are fibers that take turns on one thread of the
// machine. Blocks run one after another, or some of them at once, by turns that a seed decides. Include it before the
// kernel (g++ -include simt.h).
//
// Barriers order memory and shuffles do not, as on a GPU: under -fsanitize=thread each fiber is a thread of its own,
// and a missing barrier is a data race, found whatever the order in which fibers happen to run. simt.cpp, which makes
// them take turns, is compiled without the sanitizer, so that its own bookkeeping counts for nothing. Reads and writes
// of global memory go through __ldg, __ldcs, __ldcg, __ldcv, __stcs, __stcg, atomicAdd and atomicExch: they are
// counted, and must be aligned and inside of a buffer that `simt::allow` named. atomicOr is for shared memory. A thread
// that waits for another block must call __nanosleep, as fibers do not interrupt each other.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __shared__ static thread_local
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

struct Grid {
  int64_t blocks;
  int threads;             // of a block
  bool backwards = false;  // blocks begin from the last to the first
  int places = 1;          // blocks at once
  uint64_t seed = 0;       // of the turns that they take
};

// Runs `thread` once for each thread of each block.
void run(const Grid& grid, const std::function<void()>& thread);
void sleep();  // lets other threads and blocks go on

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
inline double __longlong_as_double(long long bits) { return std::bit_cast<double>(bits); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int __clz(unsigned bits) { return std::countl_zero(bits); }
inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __ffs(unsigned bits) { return bits == 0 ? 0 : std::countr_zero(bits) + 1; }

inline void __nanosleep(unsigned) { simt::sleep(); }

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
// Relaxed, as on a GPU: they order no other memory.
template <typename T>
T __ldcv(const T* address) {
  simt::count(address, sizeof(T), false);
  return __atomic_load_n(address, __ATOMIC_RELAXED);
}
template <typename T>
T atomicExch(T* address, T value) {
  simt::count(address, sizeof(T), true);
  return __atomic_exchange_n(address, value, __ATOMIC_RELAXED);
}
template <typename T>
T atomicAdd(T* address, T value) {
  simt::count(address, sizeof(T), true);
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline unsigned atomicOr(unsigned* address, unsigned value) {
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}
