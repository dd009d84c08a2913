// GAE on CUDA: the computation of a run of tokens by a group of threads, used by the kernels in gae_kernels.cuh.
//
// A group of threads (a warp, or a block) processes a run of tokens from its end, one tile at a time. The tiles depend
// on the sequence only, and so does the rounding. Reads and writes are 16 bytes wide and aligned in the array; through
// shared memory each thread gets consecutive tokens of the sequence.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace fastppo::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kItems = 8;  // consecutive tokens of a thread

struct Discount {
  float gap;         // 1 - gamma
  float decay;       // gamma lambda
  float log2_decay;  // -inf if decay is 0
  double gamma64, log2_decay64, decay64;
};

inline Discount discount_of(double gamma, double lam) {
  const double decay = gamma * lam, log2_decay = std::log2(decay);
  return {static_cast<float>(1.0 - gamma),
          static_cast<float>(decay),
          static_cast<float>(log2_decay),
          gamma,
          log2_decay,
          decay};
}

struct Carry {  // the state after a run: of the next unmasked token, or the bootstrap
  float advantage, value;
  bool known;  // false at the end of a chunk that is summarized
  int count;   // unmasked tokens passed
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(uint16_t x) { return __uint_as_float(static_cast<unsigned>(x) << 16); }

// decay^n. The absolute error is below 1e-7 for any decay and n; a product of n factors would lose digits.
__device__ inline float power(const Discount& d, int n) { return n == 0 ? 1.0f : exp2f(n * d.log2_decay); }

// r + gamma V' - V, in a form that loses no digits if values are large and gamma is near 1.
__device__ inline float difference(const Discount& d, float reward, float value, float next) {
  return reward + fmaf(-d.gap, next, next - value);
}

template <int kThreads>
__device__ inline void group_sync() {
  if constexpr (kThreads == kWarp) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

template <int kThreads>
struct Tile {
  static constexpr int kTokens = kThreads * kItems;
  static constexpr int kWarps = kThreads / kWarp;
  float rewards[kTokens + kTokens / kWarp];  // in the end the advantages
  float values[kTokens + kTokens / kWarp];   // in the end the returns
  uint8_t kept[kTokens];
  // For each warp: whether it has an unmasked token, the value of the first, their number, the sum of decay^t delta_t.
  bool any[kWarps];
  float first[kWarps];
  int count[kWarps];
  float sum[kWarps];
  // The last unmasked token of a chunk that is summarized.
  float last_reward, last_value;

  // One word of padding after every 32, so that threads that read 8 words apart use different banks.
  __device__ static int at(int token) { return token + token / kWarp; }
};

// Calls put(i, from[begin + i]) for 0 <= i < count, each by some thread of the group.
template <int kThreads, bool kAgain, typename T, typename Put>
__device__ inline void read(const T* from, int64_t begin, int count, int64_t size, int rank, Put put) {
  constexpr int kPer = 16 / sizeof(T);
  const int head = static_cast<int>(reinterpret_cast<uintptr_t>(from + begin) % 16 / sizeof(T));
  const int64_t aligned = begin - head;
  for (int i = rank * kPer; i < head + count; i += kThreads * kPer) {
    if (aligned + i >= 0 && aligned + i + kPer <= size) {
      const uint4* const address = reinterpret_cast<const uint4*>(from + aligned + i);
      const uint4 bits = kAgain ? __ldg(address) : __ldcs(address);
      T vector[kPer];
      memcpy(vector, &bits, sizeof bits);
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        if (i + j >= head && i + j < head + count) put(i + j - head, vector[j]);
      }
    } else {  // the vector exceeds the array
      for (int j = 0; j < kPer; ++j) {
        if (i + j >= head && i + j < head + count) put(i + j - head, __ldg(from + aligned + i + j));
      }
    }
  }
}

// to[begin + i] = get(i) for 0 <= i < count. Tokens outside of the run belong to other groups and are not written.
template <int kThreads, typename Get>
__device__ inline void write(float* to, int64_t begin, int count, int rank, Get get) {
  const int head = static_cast<int>(reinterpret_cast<uintptr_t>(to + begin) % 16 / sizeof(float));
  float* const aligned = to + begin - head;
  for (int i = rank * 4; i < head + count; i += kThreads * 4) {
    if (i >= head && i + 4 <= head + count) {
      const int at = i - head;
      __stcs(reinterpret_cast<float4*>(aligned + i), make_float4(get(at), get(at + 1), get(at + 2), get(at + 3)));
    } else {
      for (int j = 0; j < 4; ++j) {
        if (i + j >= head && i + j < head + count) __stcs(aligned + i + j, get(i + j - head));
      }
    }
  }
}

// The tokens of a tile that a thread computes.
struct Items {
  float rewards[kItems], values[kItems], delta[kItems];
  unsigned kept;  // bit j: token j exists and is unmasked
};

template <int kThreads>
__device__ inline Items items_of(const Tile<kThreads>& tile, int rank, int tokens, bool masked) {
  Items own;
  own.kept = 0;
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const int token = rank * kItems + j;
    const bool kept = token < tokens && (!masked || tile.kept[token] != 0);
    own.kept |= static_cast<unsigned>(kept) << j;
    own.rewards[j] = kept ? tile.rewards[tile.at(token)] : 0.0f;
    own.values[j] = kept ? tile.values[tile.at(token)] : 0.0f;
  }
  return own;
}

// The value of the first unmasked token after those of this thread, if the tile or `next` has one. Stores that of this
// warp in shared memory.
template <int kThreads>
__device__ inline Carry value_after(Tile<kThreads>& tile, const Items& own, int rank, Carry next) {
  const int warp = rank / kWarp, lane = rank % kWarp;
  float first = 0.0f;
#pragma unroll
  for (int j = kItems - 1; j >= 0; --j) first = own.kept >> j & 1 ? own.values[j] : first;
  const unsigned holders = __ballot_sync(kAllLanes, own.kept != 0);
  const unsigned after = lane == kWarp - 1 ? 0 : holders >> (lane + 1);
  const float from_lane = __shfl_sync(kAllLanes, first, after != 0 ? lane + __ffs(after) : lane);
  const float of_warp = __shfl_sync(kAllLanes, first, holders != 0 ? __ffs(holders) - 1 : 0);
  if (lane == 0) {
    tile.any[warp] = holders != 0;
    tile.first[warp] = of_warp;
  }
  group_sync<kThreads>();
  for (int w = Tile<kThreads>::kWarps - 1; w > warp; --w) {
    if (tile.any[w]) next = {0.0f, tile.first[w], true, 0};
  }
  if (after != 0) next = {0.0f, from_lane, true, 0};
  return next;
}

// Fills `own.delta` and returns the sum of decay^t delta_t over this thread's unmasked tokens.
template <int kThreads>
__device__ inline float differences(Tile<kThreads>& tile, Items& own, const Discount& d, Carry after) {
  float sum = 0.0f;
#pragma unroll
  for (int j = kItems - 1; j >= 0; --j) {
    own.delta[j] = 0.0f;
    if (!(own.kept >> j & 1)) continue;
    if (after.known) {
      own.delta[j] = difference(d, own.rewards[j], own.values[j], after.value);
    } else {  // at most one token of a chunk
      tile.last_reward = own.rewards[j];
      tile.last_value = own.values[j];
    }
    after = {0.0f, own.values[j], true, 0};
    sum = fmaf(d.decay, sum, own.delta[j]);
  }
  return sum;
}

// Scans one tile. Returns the carry for the tokens before it; `own.delta` becomes the advantages.
template <int kThreads>
__device__ inline Carry scan_tile(Tile<kThreads>& tile, Items& own, const Discount& d, int rank, Carry next) {
  const int warp = rank / kWarp, lane = rank % kWarp;
  float sum = differences(tile, own, d, value_after(tile, own, rank, next));
  int count = __popc(own.kept);
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {  // lane i: over lanes i to 31 in the end
    const float sum_after = __shfl_down_sync(kAllLanes, sum, step);
    const int count_after = __shfl_down_sync(kAllLanes, count, step);
    if (lane + step < kWarp) {
      sum = fmaf(power(d, count), sum_after, sum);
      count += count_after;
    }
  }
  const float sum_after = __shfl_down_sync(kAllLanes, sum, 1);
  const int count_after = __shfl_down_sync(kAllLanes, count, 1);
  if (lane == 0) {
    tile.sum[warp] = sum;
    tile.count[warp] = count;
  }
  group_sync<kThreads>();
  float into_warp = next.advantage;
  for (int w = Tile<kThreads>::kWarps - 1; w >= 0; --w) {
    if (w == warp) into_warp = next.advantage;
    if (!tile.any[w]) continue;
    const float advantage = fmaf(power(d, tile.count[w]), next.advantage, tile.sum[w]);
    next = {advantage, tile.first[w], true, next.count + tile.count[w]};
  }
  float advantage = lane == kWarp - 1 ? into_warp : fmaf(power(d, count_after), into_warp, sum_after);
#pragma unroll
  for (int j = kItems - 1; j >= 0; --j) {
    if (own.kept >> j & 1) own.delta[j] = advantage = fmaf(d.decay, advantage, own.delta[j]);
  }
  return next;
}

template <typename T>
struct Arrays {  // T: float, or uint16_t for bf16
  const T *rewards, *values;
  const uint8_t* mask;  // (M,) or nullptr
  float *advantages, *returns;
  int64_t tokens;  // M
};

// Processes tokens [begin, end) of one sequence, backwards, and writes the outputs if `kOutputs`. Returns, in every
// thread of the group, the carry for the tokens before the run.
template <int kThreads, bool kOutputs, typename T>
__device__ inline Carry walk(const Arrays<T>& arrays, const Discount& d, Tile<kThreads>& tile, int64_t begin,
                             int64_t end, Carry next) {
  constexpr int kTokens = Tile<kThreads>::kTokens;
  const int rank = threadIdx.x % kThreads;
  const bool masked = arrays.mask != nullptr;
  for (int64_t start = begin + (end - begin - 1) / kTokens * kTokens; start >= begin; start -= kTokens) {
    const int tokens = static_cast<int>(end - start < kTokens ? end - start : kTokens);
    const auto reward = [&](int i, T x) { tile.rewards[tile.at(i)] = to_float(x); };
    const auto value = [&](int i, T x) { tile.values[tile.at(i)] = to_float(x); };
    const auto kept = [&](int i, uint8_t x) { tile.kept[i] = x; };
    read<kThreads, !kOutputs>(arrays.rewards, start, tokens, arrays.tokens, rank, reward);
    read<kThreads, !kOutputs>(arrays.values, start, tokens, arrays.tokens, rank, value);
    if (masked) read<kThreads, !kOutputs>(arrays.mask, start, tokens, arrays.tokens, rank, kept);
    group_sync<kThreads>();
    Items own = items_of(tile, rank, tokens, masked);
    next = scan_tile(tile, own, d, rank, next);
    if constexpr (kOutputs) {
#pragma unroll
      for (int j = 0; j < kItems; ++j) {
        const int at = tile.at(rank * kItems + j);
        const bool there = own.kept >> j & 1;
        tile.rewards[at] = there ? own.delta[j] : 0.0f;
        tile.values[at] = there ? own.delta[j] + own.values[j] : 0.0f;
      }
      group_sync<kThreads>();
      write<kThreads>(arrays.advantages, start, tokens, rank, [&](int i) { return tile.rewards[tile.at(i)]; });
      write<kThreads>(arrays.returns, start, tokens, rank, [&](int i) { return tile.values[tile.at(i)]; });
      group_sync<kThreads>();  // before the next tile overwrites it
    }
  }
  return next;
}

}  // namespace fastppo::cuda
