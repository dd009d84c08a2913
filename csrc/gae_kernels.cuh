// GAE on CUDA: the kernels, and the order of their launches. gae_cuda.cu launches them on a GPU; tests/simt runs them
// on the CPU, thread for thread, so this file uses only the language and CUDA's built-ins.
//
// The host does not know the lengths. So each kernel is launched for all sequences and ignores those of another length:
// a warp computes a short one, a block one of up to kBlockTokens. Longer ones are divided into chunks: one kernel
// summarizes them, one passes the carry from chunk to chunk, one writes the outputs.
#pragma once

#include "gae_tile.cuh"

#undef NDEBUG  // assertions report a wrong cu_seqlens: the host never reads it, which would need a synchronisation
#include <cassert>

namespace fastppo::cuda {

constexpr int kWarpsInBlock = 4;        // of the kernels with a warp for each sequence
constexpr int kBlockThreads = 256;      // of the kernels with a block for each run
constexpr int64_t kWarpTokens = 1024;   // the longest sequence for a warp
constexpr int64_t kBlockTokens = 8192;  // the longest sequence for a block
constexpr int64_t kChunkTokens = 4096;  // at most kBlockTokens, see `slot_of`

template <typename T>
struct Call {
  Arrays<T> arrays;
  Discount discount;
  const void* cu_seqlens;  // (B+1,) int64 if `wide`, else int32
  bool wide;
  const float* bootstrap;  // (B,) or nullptr
  int64_t sequences;       // B
  // For the chunks of sequences longer than kBlockTokens, slots_of(tokens) of each.
  float4* summaries;  // see gae_summarize
  int* counts;        // unmasked tokens
  float2* carries;    // the advantage and the value that follow
};

struct Run {  // tokens [begin, end) of a sequence
  int64_t sequence, begin, end;
  __device__ int64_t length() const { return end - begin; }
};

template <typename T>
__device__ inline int64_t start_of(const Call<T>& call, int64_t sequence) {
  return call.wide ? __ldg(static_cast<const int64_t*>(call.cu_seqlens) + sequence)
                   : __ldg(static_cast<const int32_t*>(call.cu_seqlens) + sequence);
}

template <typename T>
__device__ inline Run sequence_of(const Call<T>& call, int64_t sequence) {
  const Run run = {sequence, start_of(call, sequence), start_of(call, sequence + 1)};
  assert(run.begin >= 0 && run.end <= call.arrays.tokens && "gae: cu_seqlens must run from 0 to the length of rewards");
  assert(run.begin <= run.end && "gae: cu_seqlens must never fall");
  return run;
}

template <typename T>
__device__ inline Carry after_sequence(const Call<T>& call, int64_t sequence) {
  return {0.0f, call.bootstrap == nullptr ? 0.0f : __ldg(call.bootstrap + sequence), true, 0};
}

template <typename T>
__global__ void __launch_bounds__(kWarpsInBlock* kWarp) gae_warps(const Call<T> call) {
  __shared__ Tile<kWarp> tiles[kWarpsInBlock];
  const int warp = threadIdx.x / kWarp;
  const int64_t sequence = static_cast<int64_t>(blockIdx.x) * kWarpsInBlock + warp;
  if (sequence >= call.sequences) return;
  const Run run = sequence_of(call, sequence);
  assert((sequence > 0 || run.begin == 0) && "gae: cu_seqlens must start at 0");
  assert((sequence < call.sequences - 1 || run.end == call.arrays.tokens) &&
         "gae: cu_seqlens must end at the length of rewards");
  if (run.length() == 0 || run.length() > kWarpTokens) return;
  walk<kWarp, true>(call.arrays, call.discount, tiles[warp], run.begin, run.end, after_sequence(call, sequence));
}

template <typename T>
__global__ void __launch_bounds__(kBlockThreads) gae_blocks(const Call<T> call) {
  __shared__ Tile<kBlockThreads> tile;
  const Run run = sequence_of(call, blockIdx.x);
  if (run.length() <= kWarpTokens || run.length() > kBlockTokens) return;
  walk<kBlockThreads, true>(call.arrays, call.discount, tile, run.begin, run.end, after_sequence(call, run.sequence));
}

// A block must find its chunk without a count of the chunks. So the slot of a chunk is computed from its start: 2j for
// a chunk that starts in tokens [j, j+1) * kChunkTokens of the batch, 2j + 1 if it is the first of its sequence. No two
// chunks share a slot: the chunks of a sequence start kChunkTokens apart, and no divided sequence is shorter than that.
inline int64_t slots_of(int64_t tokens) { return 2 * ((tokens + kChunkTokens - 1) / kChunkTokens); }

__device__ inline int64_t slot_of(const Run& sequence, int64_t chunk) {
  return 2 * (sequence.begin / kChunkTokens + chunk) + (chunk == 0);
}

template <typename T>
__device__ inline int64_t sequence_at(const Call<T>& call, int64_t token) {
  int64_t low = 0, high = call.sequences;  // start_of(low) <= token < start_of(high)
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (start_of(call, middle) <= token ? low : high) = middle;
  }
  return low;
}

// The chunk of a slot, or one without tokens.
template <typename T>
__device__ inline Run chunk_at(const Call<T>& call, int64_t slot) {
  const bool first = slot % 2 == 1;
  const int64_t from = slot / 2 * kChunkTokens, to = from + kChunkTokens;
  const Run none = {0, 0, 0};
  if (first && to > call.arrays.tokens) return none;
  const Run sequence = sequence_of(call, sequence_at(call, first ? to - 1 : from));
  if (sequence.length() <= kBlockTokens || first != (sequence.begin >= from)) return none;
  const int64_t chunks_before = (from - sequence.begin + kChunkTokens - 1) / kChunkTokens;
  const int64_t begin = first ? sequence.begin : sequence.begin + chunks_before * kChunkTokens;
  if (begin >= sequence.end) return none;
  return {sequence.sequence, begin, begin + kChunkTokens < sequence.end ? begin + kChunkTokens : sequence.end};
}

// For the unmasked tokens of a chunk: the sum of decay^t delta_t over all but the last, whose delta needs the value
// that follows; reward and value of the last; value of the first.
template <typename T>
__global__ void __launch_bounds__(kBlockThreads) gae_summarize(const Call<T> call) {
  __shared__ Tile<kBlockThreads> tile;
  const Run chunk = chunk_at(call, blockIdx.x);
  if (chunk.length() == 0) return;
  const Carry carry =
      walk<kBlockThreads, false>(call.arrays, call.discount, tile, chunk.begin, chunk.end, {0.0f, 0.0f, false, 0});
  if (threadIdx.x != 0) return;
  __stcg(call.summaries + blockIdx.x, make_float4(carry.advantage, tile.last_reward, tile.last_value, carry.value));
  __stcg(call.counts + blockIdx.x, carry.count);
}

// The effect of a chunk on the carry, the advantage A and the value V that follow it: A becomes offset + scale A +
// slope V, V becomes value.
struct Step {
  double scale, slope, offset, value;
  bool any;  // false: it has no unmasked token and changes nothing
};

__device__ inline Step step_of(const float4& summary, int count, const Discount& d) {
  if (count == 0) return {1.0, 0.0, 0.0, 0.0, false};
  const double weight = count == 1 ? 1.0 : exp2((count - 1) * d.log2_decay64);
  const double last = static_cast<double>(summary.y) - summary.z;
  return {weight * d.decay64, weight * d.gamma64, summary.x + weight * last, summary.w, true};
}

__device__ inline Step both(const Step& later, const Step& earlier) {
  if (!earlier.any) return later;
  if (!later.any) return earlier;
  const double offset = earlier.offset + earlier.scale * later.offset + earlier.slope * later.value;
  return {earlier.scale * later.scale, earlier.scale * later.slope, offset, earlier.value, true};
}

__device__ inline Step shuffle(const Step& step, int lane) {
  return {__shfl_sync(kAllLanes, step.scale, lane), __shfl_sync(kAllLanes, step.slope, lane),
          __shfl_sync(kAllLanes, step.offset, lane), __shfl_sync(kAllLanes, step.value, lane),
          __shfl_sync(kAllLanes, static_cast<int>(step.any), lane) != 0};
}

// A warp for each long sequence: 32 chunks at a time, the last one in lane 0.
template <typename T>
__global__ void __launch_bounds__(kWarpsInBlock* kWarp) gae_carry(const Call<T> call) {
  const int lane = threadIdx.x % kWarp;
  const int64_t sequence = static_cast<int64_t>(blockIdx.x) * kWarpsInBlock + threadIdx.x / kWarp;
  if (sequence >= call.sequences) return;
  const Run run = sequence_of(call, sequence);
  if (run.length() <= kBlockTokens) return;
  // The first step is the bootstrap: it sets every A to zero and every V to the value after the sequence.
  Step after = {0.0, 0.0, 0.0, after_sequence(call, sequence).value, true};
  for (int64_t last = (run.length() - 1) / kChunkTokens; last >= 0; last -= kWarp) {
    const int64_t chunk = last - lane;
    const int64_t slot = chunk >= 0 ? slot_of(run, chunk) : 0;
    Step step = chunk >= 0 ? step_of(__ldcg(call.summaries + slot), __ldcg(call.counts + slot), call.discount)
                           : Step{1.0, 0.0, 0.0, 0.0, false};
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const Step later = shuffle(step, lane - distance);
      if (lane >= distance) step = both(later, step);
    }
    const Step later = shuffle(step, lane - 1);
    const Step into = lane == 0 ? after : both(after, later);
    if (chunk >= 0)
      __stcg(call.carries + slot, make_float2(static_cast<float>(into.offset), static_cast<float>(into.value)));
    after = both(after, shuffle(step, kWarp - 1));
  }
}

template <typename T>
__global__ void __launch_bounds__(kBlockThreads) gae_chunks(const Call<T> call) {
  __shared__ Tile<kBlockThreads> tile;
  const Run chunk = chunk_at(call, blockIdx.x);
  if (chunk.length() == 0) return;
  const float2 into = __ldcg(call.carries + blockIdx.x);
  walk<kBlockThreads, true>(call.arrays, call.discount, tile, chunk.begin, chunk.end, {into.x, into.y, true, 0});
}

// launch(kernel, blocks, threads) for each kernel that these sizes need, in order. B >= 1.
template <typename T, typename Launch>
void launch_all(const Call<T>& call, const Launch& launch) {
  const int64_t warps = (call.sequences + kWarpsInBlock - 1) / kWarpsInBlock;
  launch(gae_warps<T>, warps, kWarpsInBlock * kWarp);
  if (call.arrays.tokens > kWarpTokens) launch(gae_blocks<T>, call.sequences, kBlockThreads);
  if (call.arrays.tokens <= kBlockTokens) return;
  launch(gae_summarize<T>, slots_of(call.arrays.tokens), kBlockThreads);
  launch(gae_carry<T>, warps, kWarpsInBlock * kWarp);
  launch(gae_chunks<T>, slots_of(call.arrays.tokens), kBlockThreads);
}

}  // namespace fastppo::cuda
