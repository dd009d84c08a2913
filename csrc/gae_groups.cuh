// GAE on CUDA: what a thread does with its groups of tokens, in the shared memory of its block, see gae_tile.cuh.
#pragma once

#include "gae_tile.cuh"

namespace fastppo::cuda {

// Tokens [first, last) and what follows them. Bits count from the first position of the thread.
struct Groups {
  int first, last;
  unsigned inside, unmasked;  // bit: a window starts here, but not with `first`; the token is unmasked
  bool continues;             // the last group is not the last one of its window
  Follower after;             // what follows the last token
};

// Writes the words of this thread that `first_set` and `last_set` read; a barrier must follow.
template <bool kMasked>
__device__ inline void find_events(Tile& tile, int mask_head) {
  const int rank = threadIdx.x, warp = rank / kWarp;
  const int here = min(max(tile.count - rank * kGroup, 0), kGroup);
  const unsigned starts = tile.starts[rank];
  unsigned events = (1u << here) - 1;
  if constexpr (kMasked) {
    events &= (tile.mask[rank] | static_cast<unsigned>(tile.mask[rank + 1]) << kGroup) >> mask_head;
  }
  events |= starts;
  tile.events[rank] = static_cast<uint16_t>(events);
  const unsigned some_starts = __ballot_sync(kAllLanes, starts != 0);
  const unsigned some_events = __ballot_sync(kAllLanes, events != 0);
  if (rank % kWarp == 0) {
    tile.some_starts[warp] = some_starts;
    tile.some_events[warp] = some_events;
  }
}

// bootstrap(i): the value after the sequence that ends before position i.
template <bool kMasked, typename Bootstrap>
__device__ inline Groups groups_of(const Tile& tile, int mask_head, Bootstrap bootstrap) {
  const int rank = threadIdx.x, from = rank * kGroup;
  Groups own = {group_from(tile, from), group_from(tile, from + kGroup), 0, kAllLanes, tile.open, {0.0f, !tile.open}};
  if (own.first == own.last) return own;
  const unsigned starts = tile.starts[rank] | static_cast<unsigned>(tile.starts[rank + 1]) << kGroup;
  own.inside = starts & ((1u << (own.last - from)) - 1) & ~((2u << (own.first - from)) - 1);
  if (own.last < tile.count) own.continues = (starts >> (own.last - from) & 1) == 0;
  if constexpr (kMasked) {
    const uint64_t low = tile.mask[rank] | static_cast<unsigned>(tile.mask[rank + 1]) << kGroup;
    const uint64_t high = rank + 2 <= kThreads ? tile.mask[rank + 2] : 0;
    own.unmasked = static_cast<unsigned>((low | high << 2 * kGroup) >> mask_head);
  }
  const int next = min(first_set(tile.events, tile.some_events, own.last), tile.count);
  const bool ends = next == tile.count || (tile.starts[next / kGroup] >> next % kGroup & 1) != 0;
  if (!ends) {
    own.after = {tile.values[Tile::at(next)], true};
  } else if (next == tile.count && tile.open) {
    own.after = {0.0f, false};
  } else {
    own.after = {bootstrap(next), true};
  }
  return own;
}

// Whether a thread has one group and knows what follows it, as almost all do. It takes few instructions then.
__device__ inline bool is_one_group(const Groups& own) { return own.inside == 0 && own.after.known; }

// Calls visit(position, there, unmasked, reward, value) for kGroup positions from own.first on, backwards, whether a
// token is there or not. Several reads are on their way at once.
template <typename Visit>
__device__ inline void backwards_in_group(const Tile& tile, const Groups& own, Visit visit) {
  constexpr int kReads = 8;
  const unsigned there = (1u << (own.last - own.first)) - 1;
  const unsigned unmasked = there & own.unmasked >> (own.first - static_cast<int>(threadIdx.x) * kGroup);
#pragma unroll
  for (int from = kGroup - kReads; from >= 0; from -= kReads) {
    float rewards[kReads], values[kReads];
#pragma unroll
    for (int j = 0; j < kReads; ++j) {
      const int at = Tile::at(own.first + from + j);
      const bool used = unmasked >> (from + j) & 1;
      rewards[j] = used ? tile.rewards[at] : 0.0f;
      values[j] = used ? tile.values[at] : 0.0f;
    }
#pragma unroll
    for (int j = kReads - 1; j >= 0; --j) {
      const int bit = from + j;
      visit(own.first + bit, (there >> bit & 1) != 0, (unmasked >> bit & 1) != 0, rewards[j], values[j]);
    }
  }
}

// For any thread: calls visit(position) for its unmasked tokens from the last to the first, and ends(position) where a
// window ends before a position between them.
template <typename Ends, typename Visit>
__device__ inline void backwards(const Groups& own, Ends ends, Visit visit) {
  const int from = threadIdx.x * kGroup;
#pragma unroll 1
  for (int i = own.last - 1; i >= own.first; --i) {
    if (own.inside >> (i - from) & 2) ends(i + 1);
    if (own.unmasked >> (i - from) & 1) visit(i);
  }
}

// The sum over the first group of this thread. `first`: what precedes the thread would be followed by.
template <typename Bootstrap>
__device__ inline Partial partial_of(Tile& tile, const Groups& own, const Discount& d, Bootstrap bootstrap,
                                     Follower& first) {
  float sum = 0.0f;
  int count = 0;
  first = own.after;
  if (is_one_group(own)) {
    backwards_in_group(tile, own, [&](int, bool, bool unmasked, float reward, float value) {
      const float delta = difference(d, reward, value, first.value);
      sum = unmasked ? fmaf(d.decay, sum, delta) : sum;
      first.value = unmasked ? value : first.value;
      count += unmasked;
    });
    return Partial::of(sum, count, own.continues);
  }
  const auto ends = [&](int position) {
    sum = 0.0f;
    count = 0;
    first = {bootstrap(position), true};
  };
  backwards(own, ends, [&](int i) {
    const float reward = tile.rewards[Tile::at(i)], value = tile.values[Tile::at(i)];
    if (first.known) {
      sum = fmaf(d.decay, sum, difference(d, reward, value, first.value));
    } else {  // one token of a block
      tile.last_reward = reward;
      tile.last_value = value;
    }
    ++count;
    first = {value, true};
  });
  return Partial::of(sum, count, own.inside == 0 && own.continues);
}

// Sums up to the end of the window, or of the block, in tile.partials[kFinal] of each thread (Kogge and Stone 1973).
constexpr int kFinal = 0;

__device__ inline Partial scan(Tile& tile, Partial own, const Discount& d) {
  const int rank = threadIdx.x;
  int buffer = 0;
#pragma unroll
  for (int step = 1; step < kThreads; step *= 2, buffer ^= 1) {
    tile.partials[buffer][rank] = own;
    __syncthreads();
    if (!own.open() || rank + step >= kThreads) continue;
    const Partial later = tile.partials[buffer][rank + step];
    const float sum = fmaf(power(d, own.tokens()), later.sum, own.sum);
    own = Partial::of(sum, own.tokens() + later.tokens(), later.open());
  }
  static_assert(kThreads == 256, "an even number of steps");
  tile.partials[kFinal][rank] = own;
  if (rank == 0) tile.partials[kFinal][kThreads] = Partial::of(0.0f, 0, tile.open);
  return own;
}

// Overwrites rewards and values with advantages and returns.
template <bool kMasked, typename Bootstrap>
__device__ inline void finish(Tile& tile, const Groups& own, const Discount& d, Bootstrap bootstrap) {
  float advantage = 0.0f;  // of the next unmasked token of the window
  if (own.continues) {
    const Partial later = tile.partials[kFinal][threadIdx.x + 1];
    const bool all = later.open() && later.tokens() > 0;
    advantage = all ? fmaf(power(d, later.tokens() - 1), tile.last_advantage, later.sum) : later.sum;
  }
  Follower follower = own.after;
  if (is_one_group(own)) {
    backwards_in_group(tile, own, [&](int i, bool there, bool unmasked, float reward, float value) {
      const float delta = difference(d, reward, value, follower.value);
      advantage = unmasked ? fmaf(d.decay, advantage, delta) : advantage;
      follower.value = unmasked ? value : follower.value;
      if (there) {
        tile.rewards[Tile::at(i)] = unmasked ? advantage : 0.0f;
        tile.values[Tile::at(i)] = unmasked ? advantage + value : 0.0f;
      }
    });
    return;
  }
  if constexpr (kMasked) {
    const int from = threadIdx.x * kGroup;
    for (int i = own.first; i < own.last; ++i) {
      if (!(own.unmasked >> (i - from) & 1)) tile.rewards[Tile::at(i)] = tile.values[Tile::at(i)] = 0.0f;
    }
  }
  const auto ends = [&](int position) {
    advantage = 0.0f;
    follower = {bootstrap(position), true};
  };
  backwards(own, ends, [&](int i) {
    float& reward = tile.rewards[Tile::at(i)];
    float& value = tile.values[Tile::at(i)];
    const float delta = difference(d, reward, value, follower.value);
    advantage = follower.known ? fmaf(d.decay, advantage, delta) : tile.last_advantage;
    follower = {value, true};
    reward = advantage;
    value += advantage;
  });
}

}  // namespace fastppo::cuda
