// GAE on CUDA: what a block does with its tokens, used by the kernel in gae_kernels.cuh.
//
// A block has the tokens of some windows (parts of sequences, see gae_kernels.cuh), next to each other in the batch. It
// reads all of them at once, 16 bytes at a time, into shared memory. There a window is divided into groups of kGroup
// tokens, from its first token on, and a thread computes the groups that start in its kGroup positions. So the groups
// of a window belong to consecutive threads, and sums over them are added in an order that depends on the distance to
// the end of the window only: the rounding of a sequence does not depend on where it lies in the batch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace fastppo::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kGroup = 16;                     // consecutive tokens of a thread; bits in a word of `Tile`
constexpr int kTokens = kThreads * kGroup;     // of a tile, with up to 15 before the first that fill its 16 bytes
constexpr int kWindow = kTokens / 2 - kGroup;  // so that the windows of a block, less than 2 kWindow tokens, fit a tile

struct Discount {
  float gap;         // 1 - gamma
  float decay;       // gamma lambda
  float log2_decay;  // -inf if decay is 0
  double gamma64, lam64, log2_decay64;
};

inline Discount discount_of(double gamma, double lam) {
  const double decay = gamma * lam, log2_decay = std::log2(decay);
  return {static_cast<float>(1.0 - gamma),
          static_cast<float>(decay),
          static_cast<float>(log2_decay),
          gamma,
          lam,
          log2_decay};
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(uint16_t x) { return __uint_as_float(static_cast<unsigned>(x) << 16); }

// decay^n. The absolute error is below 1e-7 for any decay and n; a product of n factors would lose digits.
__device__ inline float power(const Discount& d, int n) { return n == 0 ? 1.0f : exp2f(n * d.log2_decay); }
__device__ inline double power64(const Discount& d, int n) { return n == 0 ? 1.0 : exp2(n * d.log2_decay64); }

// r + gamma V' - V, in a form that loses no digits if values are large and gamma is near 1.
__device__ inline float difference(const Discount& d, float reward, float value, float next) {
  return reward + fmaf(-d.gap, next, next - value);
}

template <typename T>
struct Arrays {  // T: float, or uint16_t for bf16
  const T *rewards, *values;
  const uint8_t* mask;  // (M,) or nullptr
  float *advantages, *returns;
  int64_t tokens;  // M
};

// Unmasked tokens next to each other, up to the end of their window or less far.
struct Partial {
  float sum;       // of decay^t delta_t; without the token whose next value only another block knows, see `Follower`
  unsigned count;  // and in the highest bit whether the window continues behind them

  __device__ static Partial of(float sum, int count, bool open) {
    return {sum, static_cast<unsigned>(count) | static_cast<unsigned>(open) << 31};
  }
  __device__ bool open() const { return count >> 31 != 0; }
  __device__ int tokens() const { return static_cast<int>(count & ~(1u << 31)); }
};

struct Follower {  // the value that follows a token: of the next unmasked one of its sequence, or the bootstrap
  float value;
  bool known;  // false for the last unmasked token of a window that continues in the next block
};

// Shared memory. Positions count from the first token of the block. A bit of a position is in the word of the thread
// that has it.
struct Tile {
  float rewards[kTokens + kTokens / kWarp];  // in the end the advantages
  float values[kTokens + kTokens / kWarp];   // in the end the returns
  Partial partials[2][kThreads + 1];
  alignas(4) uint16_t starts[kThreads + 2];  // bit: a window starts here
  uint16_t events[kThreads];                 // bit: a window starts here, or the token is unmasked
  alignas(4) uint16_t mask[kThreads + 2];    // as in memory, from the multiple of 16 bytes before the first token
  unsigned some_starts[kWarps], some_events[kWarps];  // bit: the word of this thread is not 0
  float last_reward, last_value;                      // of the token whose next value only another block knows
  float last_advantage;                               // and its advantage
  int count;                                          // tokens
  bool open;                                          // the last window continues in the next block

  // One word of padding after every 32, so that threads that read 16 words apart use different banks.
  __device__ static int at(int position) { return position + (position >> 5); }
};

// Sets bits of a word, of words aligned to 4 bytes.
__device__ inline void set_bits(uint16_t* words, int word, unsigned bits) {
  atomicOr(reinterpret_cast<unsigned*>(words) + word / 2, bits << word % 2 * kGroup);
}

__device__ inline void set_bit(uint16_t* words, int position) {
  set_bits(words, position / kGroup, 1u << position % kGroup);
}

// The first position from `from` on whose bit is set, or kTokens.
__device__ inline int first_set(const uint16_t* words, const unsigned* some, int from) {
  int word = from / kGroup;
  if (word >= kThreads) return kTokens;
  const unsigned own = static_cast<unsigned>(words[word]) >> from % kGroup;
  if (own != 0) return from + __ffs(own) - 1;
  for (int w = ++word / kWarp; w < kWarps; ++w) {
    const unsigned rest = w == word / kWarp ? some[w] & kAllLanes << word % kWarp : some[w];
    if (rest == 0) continue;
    word = w * kWarp + __ffs(rest) - 1;
    return word * kGroup + __ffs(words[word]) - 1;
  }
  return kTokens;
}

// The last position up to `to` whose bit is set. There is one.
__device__ inline int last_set(const uint16_t* words, const unsigned* some, int to) {
  int word = to / kGroup;
  unsigned bits = words[word] & ((2u << to % kGroup) - 1);
  if (bits == 0) {
    int w = word / kWarp;
    unsigned before = some[w] & ((1u << word % kWarp) - 1);
    while (before == 0) before = some[--w];
    word = w * kWarp + kWarp - 1 - __clz(before);
    bits = words[word];
  }
  return word * kGroup + 31 - __clz(bits);
}

// The start of the first group from `from` on, or the number of tokens. `from` is the first position of a thread.
__device__ inline int group_from(const Tile& tile, int from) {
  if (from >= tile.count) return tile.count;
  const int window = last_set(tile.starts, tile.some_starts, from);
  const int group = window + (from - window + kGroup - 1) / kGroup * kGroup;
  const unsigned starts = tile.starts[from / kGroup];
  const int next = starts != 0 ? from + __ffs(starts) - 1 : kTokens;  // a window may be shorter
  return min(min(group, next), tile.count);
}

// Reading and writing

template <typename T>
constexpr int kPer = 16 / sizeof(T);  // elements of a load
template <typename T>
constexpr int kLoads = kTokens / (kThreads * kPer<T>);  // of a thread

// The loads of a thread, all on their way at once. Vector k has the elements from first(k) on, counted from the first
// token. Vectors that exceed the array are left out: a view may start or end between multiples of 16 bytes.
template <typename T>
struct Loads {
  uint4 bits[kLoads<T>];
  int head;       // elements between the multiple of 16 bytes before the first token and that token
  int low, high;  // the whole vectors inside of the array have elements [low, high)

  __device__ int first(int k) const { return (k * kThreads + static_cast<int>(threadIdx.x)) * kPer<T> - head; }
};

// from[begin + i] for 0 <= i < count.
template <typename T>
__device__ inline Loads<T> load(const T* from, int64_t begin, int count, int64_t size) {
  Loads<T> loads;
  loads.head = static_cast<int>(reinterpret_cast<uintptr_t>(from + begin) % 16 / sizeof(T));
  loads.low = begin < loads.head ? kPer<T> - loads.head : -loads.head;
  const int rest = static_cast<int>(size - begin < count + kPer<T> ? size - begin : count + kPer<T>);
  loads.high = (rest + loads.head) / kPer<T> * kPer<T> - loads.head;
#pragma unroll
  for (int k = 0; k < kLoads<T>; ++k) {
    const int i = loads.first(k);
    loads.bits[k] = {0, 0, 0, 0};
    if (i >= loads.low && i < min(count, loads.high))
      loads.bits[k] = __ldcs(reinterpret_cast<const uint4*>(from + begin + i));
  }
  return loads;
}

// Calls put(i, from[begin + i]) for the elements of the vectors.
template <typename T, typename Put>
__device__ inline void each(const Loads<T>& loads, int count, Put put) {
  const int low = max(loads.low, 0), high = min(loads.high, count);
#pragma unroll
  for (int k = 0; k < kLoads<T>; ++k) {
    const int first = loads.first(k);
    if (first >= high) return;
    T vector[kPer<T>];
    memcpy(vector, &loads.bits[k], sizeof vector);
    if (first >= low && first + kPer<T> <= high) {
#pragma unroll
      for (int j = 0; j < kPer<T>; ++j) put(first + j, vector[j]);
    } else {
#pragma unroll
      for (int j = 0; j < kPer<T>; ++j) {
        if (first + j >= low && first + j < high) put(first + j, vector[j]);
      }
    }
  }
}

// The same for the elements of the vectors that were left out.
template <typename T, typename Put>
__device__ inline void each_left_out(const Loads<T>& loads, const T* from, int64_t begin, int count, Put put) {
  if (loads.low <= 0 && loads.high >= count) return;
  const int before = threadIdx.x, behind = max(loads.high, max(loads.low, 0)) + before;
  if (before < min(loads.low, count)) put(before, __ldg(from + begin + before));
  if (behind < count) put(behind, __ldg(from + begin + behind));
}

// to[begin + i] = from[Tile::at(i)] for 0 <= i < count. The tokens beside them belong to other blocks.
__device__ inline void write(float* to, int64_t begin, int count, const float* from) {
  const int head = static_cast<int>(reinterpret_cast<uintptr_t>(to + begin) % 16 / sizeof(float));
#pragma unroll
  for (int k = 0; k < kLoads<float>; ++k) {
    const int first = (k * kThreads + static_cast<int>(threadIdx.x)) * 4 - head;
    if (first >= count) continue;
    if (first >= 0 && first + 4 <= count) {
      const auto get = [&](int j) { return from[Tile::at(first + j)]; };
      __stcs(reinterpret_cast<float4*>(to + begin + first), make_float4(get(0), get(1), get(2), get(3)));
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (first + j >= 0 && first + j < count) __stcs(to + begin + first + j, from[Tile::at(first + j)]);
      }
    }
  }
}

// The unmasked tokens of a vector of the mask, as bits. A byte that is not 0 is unmasked.
__device__ inline unsigned bits_of(const uint4& bytes) {
  unsigned bits = 0;
  const unsigned words[] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    unsigned any = words[w] | words[w] >> 4;
    any |= any >> 2;
    any = (any | any >> 1) & 0x01010101u;
    bits |= ((any | any >> 7 | any >> 14 | any >> 21) & 0xf) << 4 * w;
  }
  return bits;
}

}  // namespace fastppo::cuda
