// GAE on CUDA: the kernel. gae_cuda.cu launches it on a GPU; tests/simt runs it on the CPU, thread for thread, so this
// file uses only the language and CUDA's built-ins.
//
// The host does not know the lengths, and one launch computes all. A sequence is divided into windows of kWindow tokens
// from its first token on; the last one may be shorter. A block computes the windows that start in its slot, kWindow
// positions of the batch. As the windows of a sequence start kWindow apart, the next one of a window is in the next
// slot: only the last window of a block can continue behind it, and only the first one began before it.
//
// The advantages of a window depend on what follows it through one number, V' + lambda A' of the next unmasked token,
// and so does this number of the window itself: it is a + b (V' + lambda A'). A block writes a and b of its first
// window as soon as it has them, and reads those of the windows that follow its last one (decoupled look-back, Merrill
// and Garland 2016), up to the next checkpoint, every kCheckpoint-th window of a sequence, whose number itself is
// written as well. Which of them are read, and the order of their combination, depend on the sequence only and not on
// what happens to be written first: so do the results, bit for bit.
//
// A block waits only for blocks after it in the batch. They are running or done, because slots are handed out from the
// last to the first by a counter, in the order in which blocks begin to run. So the one among the running blocks whose
// slot is last never waits, and no number of blocks that a GPU can run at a time, or order that it starts them in,
// makes them wait for each other.
#pragma once

#include "gae_groups.cuh"

#undef NDEBUG  // assertions report a wrong cu_seqlens: the host never reads it, which would need a synchronisation
#include <cassert>

namespace fastppo::cuda {

constexpr int kBlocks = 4;                    // of a multiprocessor, at least
constexpr int kOfLane = 4;                    // windows that a lane combines
constexpr int kCheckpoint = kWarp * kOfLane;  // windows of a sequence from one checkpoint to the next

// What a block tells those before it, written once, each word by itself: one that is 0 is not written yet.
struct Message {
  unsigned long long a, b;
  unsigned long long at_checkpoint;  // V + lambda A of the first token, if its window is a checkpoint
};

template <typename T>
struct Call {
  Arrays<T> arrays;
  Discount discount;
  const void* cu_seqlens;  // (B+1,) int64 if `wide`, else int32
  bool wide;
  const float* bootstrap;  // (B,) or nullptr
  int64_t sequences;       // B >= 1
  int64_t blocks;          // blocks_of(tokens)
  int64_t checked;         // sequences that a block checks: B / blocks, rounded up
  Message* messages;       // (blocks,), zeros; not used if there is one block, nor is `begun`
  int* begun;              // blocks that run or have run: zero
};

inline int64_t blocks_of(int64_t tokens) { return tokens == 0 ? 1 : (tokens + kWindow - 1) / kWindow; }

// The words of a message

constexpr unsigned long long kNan = 0x7ff8000000000000ull;
constexpr unsigned long long kNever = 0x7ff800000000b10cull;  // of a NaN, which is written as kNan

__device__ inline unsigned long long word_of(double x) {
  return (x == x ? static_cast<unsigned long long>(__double_as_longlong(x)) : kNan) ^ kNever;
}

__device__ inline double number_of(const unsigned long long* word, unsigned long long read) {
  while (read == 0) {
    __nanosleep(32);
    read = __ldcv(word);
  }
  return __longlong_as_double(static_cast<long long>(read ^ kNever));
}

struct Affine {  // of x: a + b x
  double a, b;
};

__device__ inline Affine after(const Affine& outer, const Affine& inner) {
  return {fma(outer.b, inner.a, outer.a), outer.b * inner.b};
}

// Sequences and windows

template <typename T>
__device__ inline int64_t start_of(const Call<T>& call, int64_t sequence) {
  return call.wide ? __ldg(static_cast<const int64_t*>(call.cu_seqlens) + sequence)
                   : __ldg(static_cast<const int32_t*>(call.cu_seqlens) + sequence);
}

// Each block checks some of the starts.
template <typename T>
__device__ inline void check_starts(const Call<T>& call, int64_t slot) {
  for (int64_t i = threadIdx.x; i < call.checked; i += kThreads) {
    const int64_t sequence = slot * call.checked + i;
    if (sequence >= call.sequences) return;
    const int64_t begin = start_of(call, sequence), end = start_of(call, sequence + 1);
    assert(begin >= 0 && end <= call.arrays.tokens && "gae: cu_seqlens must run from 0 to the length of rewards");
    assert(begin <= end && "gae: cu_seqlens must never fall");
    assert((sequence > 0 || begin == 0) && "gae: cu_seqlens must start at 0");
    assert((sequence < call.sequences - 1 || end == call.arrays.tokens) &&
           "gae: cu_seqlens must end at the length of rewards");
  }
}

// The last of sequences [low, high) that starts at or before a token; `low` does.
template <typename T>
__device__ inline int64_t sequence_at(const Call<T>& call, int64_t token, int64_t low, int64_t high) {
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (start_of(call, middle) <= token ? low : high) = middle;
  }
  return low;
}

// The same of all sequences, by a warp.
template <typename T>
__device__ inline int64_t warp_sequence_at(const Call<T>& call, int64_t token) {
  int64_t low = 0, high = call.sequences;
  while (high - low > 1) {
    const int64_t step = (high - low + kWarp - 1) / kWarp, sequence = low + step * (threadIdx.x % kWarp);
    const bool before = sequence == low || (sequence < high && start_of(call, sequence) <= token);
    const int64_t steps = __popc(__ballot_sync(kAllLanes, before)) - 1;  // starts never fall
    high = low + (steps + 1) * step < high ? low + (steps + 1) * step : high;
    low += steps * step;
  }
  return low;
}

// Where the windows of a slot begin: with the first one that starts at or after the slot.
struct Edge {
  int64_t token, sequence, window;  // window > 0: the sequence has begun before the slot, else 0
  int64_t windows;                  // of the sequence
};

template <typename T>
__device__ inline Edge edge_of(const Call<T>& call, int64_t slot) {
  const int64_t from = slot * kWindow;
  if (from >= call.arrays.tokens) return {call.arrays.tokens, call.sequences - 1, 0, 0};
  const int64_t sequence = warp_sequence_at(call, from);
  const int64_t begin = start_of(call, sequence), end = start_of(call, sequence + 1);
  const int64_t window = (from - begin + kWindow - 1) / kWindow, windows = (end - begin + kWindow - 1) / kWindow;
  if (window >= windows) return {end, sequence, 0, windows};
  return {begin + window * kWindow, sequence, window, windows};
}

// V' + lambda A' after the last window of a block, where the next block begins with the next window of its sequence.
// A warp reads the messages.
__device__ inline double look_back(const Message* next, const Edge& edge) {
  const int lane = threadIdx.x % kWarp;
  const int64_t checkpoint = (edge.window + kCheckpoint - 1) / kCheckpoint * kCheckpoint;
  const int windows = static_cast<int>((checkpoint < edge.windows ? checkpoint : edge.windows) - edge.window);
  unsigned long long a[kOfLane], b[kOfLane], end = 1;
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {  // all reads on their way before the first wait
    const int window = lane * kOfLane + i;
    a[i] = window < windows ? __ldcv(&next[window].a) : 1;
    b[i] = window < windows ? __ldcv(&next[window].b) : 1;
  }
  if (checkpoint < edge.windows) end = __ldcv(&next[windows].at_checkpoint);
  Affine all = {0.0, 1.0};
#pragma unroll
  for (int i = kOfLane - 1; i >= 0; --i) {
    const int window = lane * kOfLane + i;
    if (window >= windows) continue;
    all = after({number_of(&next[window].a, a[i]), number_of(&next[window].b, b[i])}, all);
  }
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {  // lane 0: over all lanes in the end
    const Affine later = {__shfl_down_sync(kAllLanes, all.a, step), __shfl_down_sync(kAllLanes, all.b, step)};
    if (lane + step < kWarp) all = after(all, later);
  }
  // The last window of a sequence has b = 0.
  return checkpoint < edge.windows ? fma(all.b, number_of(&next[windows].at_checkpoint, end), all.a) : all.a;
}

// a and b of the first window of a block, for its first thread. follower: of what precedes the window.
__device__ inline Affine effect_of(const Tile& tile, const Partial& partial, const Follower& follower,
                                   const Discount& d) {
  const double sum = partial.sum, value = follower.value;
  if (!partial.open()) return {fma(d.lam64, sum, value), 0.0};
  if (partial.tokens() == 0) return {0.0, 1.0};
  const double last = static_cast<double>(tile.last_reward) - tile.last_value;
  const double advantage = fma(power64(d, partial.tokens() - 1), last, sum);
  return {fma(d.lam64, advantage, value), power64(d, partial.tokens())};
}

template <typename T, bool kMasked>
__global__ void __launch_bounds__(kThreads, kBlocks) gae_windows(const Call<T> call) {
  __shared__ Tile tile;
  __shared__ int64_t slot_of_block;
  __shared__ Edge edges[2];
  const int rank = threadIdx.x, warp = rank / kWarp;
  const Arrays<T>& arrays = call.arrays;
  if (rank == 0) slot_of_block = call.blocks == 1 ? 0 : call.blocks - 1 - atomicAdd(call.begun, 1);
  for (int i = rank; i < kThreads + 2; i += kThreads) tile.starts[i] = tile.mask[i] = 0;
  __syncthreads();
  const int64_t slot = slot_of_block;
  check_starts(call, slot);
  if (warp < 2) {
    const Edge found = edge_of(call, slot + warp);
    if (rank % kWarp == 0) edges[warp] = found;
  }
  __syncthreads();
  const Edge &edge = edges[0], &end = edges[1];
  const int64_t begin = edge.token, tokens = end.token - begin;
  assert(begin >= 0 && tokens >= 0 && tokens < 2 * kWindow && end.token <= arrays.tokens &&
         "gae: cu_seqlens must run from 0 to the length of rewards and never fall");
  const int count = static_cast<int>(tokens);

  const Loads<T> rewards = load(arrays.rewards, begin, count, arrays.tokens);
  const Loads<T> values = load(arrays.values, begin, count, arrays.tokens);
  Loads<uint8_t> mask;
  mask.head = 0;
  if constexpr (kMasked) mask = load(arrays.mask, begin, count, arrays.tokens);
  for (int64_t sequence = edge.sequence + rank; sequence <= end.sequence; sequence += kThreads) {
    const int64_t start = sequence == edge.sequence ? 0 : start_of(call, sequence) - begin;
    if (start >= 0 && start < count) set_bit(tile.starts, static_cast<int>(start));
  }
  const auto reward = [&](int i, T x) { tile.rewards[Tile::at(i)] = to_float(x); };
  const auto value = [&](int i, T x) { tile.values[Tile::at(i)] = to_float(x); };
  each(rewards, count, reward);
  each_left_out(rewards, arrays.rewards, begin, count, reward);
  each(values, count, value);
  each_left_out(values, arrays.values, begin, count, value);
  if constexpr (kMasked) {
    set_bits(tile.mask, rank, bits_of(mask.bits[0]));
    each_left_out(mask, arrays.mask, begin, count, [&](int i, uint8_t x) {
      if (x != 0) set_bit(tile.mask, i + mask.head);
    });
  }
  if (rank == 0) {
    tile.count = count;
    tile.open = end.window > 0;
  }
  __syncthreads();
  find_events<kMasked>(tile, mask.head);
  __syncthreads();

  // The value after the sequence that ends before position i.
  const auto bootstrap = [&](int i) {
    if (call.bootstrap == nullptr) return 0.0f;
    return __ldg(call.bootstrap + sequence_at(call, edge.token + i - 1, edge.sequence, end.sequence + 1));
  };
  const Groups own = groups_of<kMasked>(tile, mask.head, bootstrap);
  Follower follower;
  const Partial partial = scan(tile, partial_of(tile, own, call.discount, bootstrap, follower), call.discount);

  // What is not of a window that began before is NaN: no block reads it, unless cu_seqlens is wrong. Then the block
  // that waits for it must end, so that one that finds the error can begin.
  Affine effect = {static_cast<double>(NAN), 0.0};
  if (rank == 0 && call.blocks > 1) {
    if (edge.window > 0) effect = effect_of(tile, partial, follower, call.discount);
    atomicExch(&call.messages[slot].a, word_of(effect.a));
    atomicExch(&call.messages[slot].b, word_of(effect.b));
  }
  double next = 0.0;
  if (tile.open && warp == 0) next = look_back(call.messages + slot + 1, end);
  if (rank == 0) {
    tile.last_advantage =
        static_cast<float>(fma(call.discount.gamma64, next, static_cast<double>(tile.last_reward) - tile.last_value));
    if (call.blocks > 1 && (edge.window == 0 || edge.window % kCheckpoint == 0)) {
      const double at_checkpoint = partial.open() ? fma(effect.b, next, effect.a) : effect.a;
      atomicExch(&call.messages[slot].at_checkpoint, word_of(at_checkpoint));
    }
  }
  __syncthreads();
  finish<kMasked>(tile, own, call.discount, bootstrap);
  __syncthreads();
  write(arrays.advantages, begin, count, tile.rewards);
  write(arrays.returns, begin, count, tile.values);
}

// launch(kernel, blocks, threads)
template <typename T, typename Launch>
void launch_once(const Call<T>& call, const Launch& launch) {
  launch(call.arrays.mask == nullptr ? &gae_windows<T, false> : &gae_windows<T, true>, call.blocks, kThreads);
}

}  // namespace fastppo::cuda
