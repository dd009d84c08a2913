// fastppo::gae: advantages and returns of packed sequences: the schema, and the kernel for the CPU.
#include "gae_arguments.h"
#include "simd.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

namespace fastppo {
namespace {

using torch::stable::Tensor;

// A sequence is divided into blocks of kBlock tokens from its start: the blocks, and hence the rounding, depend on the
// sequence only.
constexpr int64_t kBlock = 2048;
constexpr int64_t kGrain = 8192;  // tokens for which waking a thread pays off
constexpr double kFold = 0.6;     // the time of a summary over that of the outputs
constexpr int64_t kMaxLanes = 16;

struct Discount {
  float gap;                   // 1 - gamma
  float power[kMaxLanes + 1];  // decay^k, decay = gamma lambda
  float reach[2 * kMaxLanes];  // decay^(kMaxLanes - k), then zeros: weights of the carry in a register
  double gamma, decay;
};

struct Carry {  // the advantage and the value of the token that follows
  double advantage, value;
};

struct Summary {  // of the unmasked tokens of a block; the delta of the last one needs the value that follows
  int64_t count;
  double sum;  // of decay^t delta_t over all tokens but the last
  double last_reward, last_value, first_value;
};

template <typename T>
struct Call {
  const T *rewards, *values;
  const float* bootstrap;  // (B,) or nullptr
  const uint8_t* mask;     // (M,) or nullptr
  float *advantages, *returns;
  Discount discount;
};

// The carry before a block, from the carry after it.
Carry across(const Discount& d, const Summary& block, Carry next) {
  if (block.count == 0) return next;
  const double last = block.last_reward + d.gamma * next.value - block.last_value + d.decay * next.advantage;
  return {block.sum + std::pow(d.decay, block.count - 1) * last, block.first_value};
}

#define BODY "gae.inc"
#include "levels.inc"

template <typename T>
struct Level {
  Summary (*summarize)(const Call<T>&, int64_t, int64_t);
  Carry (*finish)(const Call<T>&, int64_t, int64_t, Carry, bool);
};

template <typename T>
Level<T> level() {
  return {AT_LEVEL(summarize<T>), AT_LEVEL(finish<T>)};
}

Discount discount_of(double gamma, double lam) {
  Discount d{};
  d.gamma = gamma;
  d.decay = gamma * lam;
  d.gap = static_cast<float>(1.0 - gamma);
  for (int64_t k = 0; k <= kMaxLanes; ++k) d.power[k] = static_cast<float>(std::pow(d.decay, k));
  for (int64_t k = 0; k < kMaxLanes; ++k) d.reach[k] = d.power[kMaxLanes - k];
  return d;
}

struct Handover {  // a carry from one thread to another
  Carry carry;
  std::atomic<bool> ready{false};
};

// A sequence that is long relative to the batch: thread k computes the piece [cuts[k], cuts[k + 1]). To get the carry
// into its piece, thread k summarizes the piece after it. The last thread needs no carry of another thread, and shares
// its piece with the thread before it; so that all threads end at the same time, this piece is the longest.
struct Shared {
  int64_t sequence;
  std::vector<int64_t> cuts;
  int64_t meeting;
  std::vector<Handover> given;  // by thread k: the carry after `summarized_to(k)`

  Shared(int64_t sequence, int64_t begin, int64_t end, int64_t threads) : sequence(sequence), given(threads) {
    const double piece = (end - begin) / (threads + kFold);
    const auto cut = [&](double at) { return begin + static_cast<int64_t>(at) / kBlock * kBlock; };
    for (int64_t k = 0; k < threads; ++k) cuts.push_back(cut(piece * k));
    cuts.push_back(end);
    meeting = cut(piece * threads);
  }

  int64_t last() const { return static_cast<int64_t>(given.size()) - 1; }
  // The end of the part of piece k that thread k - 1 summarizes.
  int64_t summarized_to(int64_t k) const { return k == last() ? meeting : cuts[k + 1]; }
};

template <typename T>
struct Batch {
  const Call<T>& call;
  const Level<T> on;
  const std::vector<int64_t>& starts;
  const int64_t threads;
  std::vector<Shared> shared;
  std::vector<int64_t> firsts;  // thread k computes the sequences [firsts[k], firsts[k + 1]), except the shared ones

  Batch(const Call<T>& call, const std::vector<int64_t>& starts, int64_t threads)
      : call(call), on(level<T>()), starts(starts), threads(threads), firsts(1) {
    const int64_t sequences = static_cast<int64_t>(starts.size()) - 1;
    int64_t whole = starts.back(), passed = 0;  // tokens that are not shared
    for (int64_t s = 0; s < sequences; ++s) {
      if (!is_shared(s)) continue;
      shared.emplace_back(s, starts[s], starts[s + 1], threads);
      whole -= starts[s + 1] - starts[s];
    }
    for (int64_t s = 0; s < sequences; ++s) {
      const int64_t shares = static_cast<int64_t>(firsts.size());
      if (shares < threads && passed > whole / threads * shares) firsts.push_back(s);
      if (!is_shared(s)) passed += starts[s + 1] - starts[s];
    }
    firsts.resize(threads, sequences);
    firsts.push_back(sequences);
  }

  bool is_shared(int64_t s) const {
    return threads > 1 && starts[s + 1] - starts[s] > std::max(2 * kGrain, starts.back() / (4 * threads));
  }

  // A thread always gets the same tokens, because they may still be in its caches.
  void work(int64_t thread) {
    for (int64_t s = firsts[thread + 1] - 1; s >= firsts[thread]; --s) {  // backwards, as within a sequence
      if (!is_shared(s)) on.finish(call, starts[s], starts[s + 1], after(s), false);
    }
    for (Shared& sequence : shared) finish_piece(sequence, thread);
  }

  void finish_piece(Shared& sequence, int64_t thread) {
    const int64_t begin = sequence.cuts[thread], end = sequence.cuts[thread + 1],
                  given = sequence.summarized_to(thread);
    const Carry follows = carry_into(sequence, thread);
    const Carry carry = on.finish(call, given, end, follows, true);
    sequence.given[thread].carry = carry;
    sequence.given[thread].ready.store(true, std::memory_order_release);
    on.finish(call, begin, given, carry, false);
  }

  // The carry into the piece of a thread.
  Carry carry_into(const Shared& sequence, int64_t thread) const {
    if (thread == sequence.last()) return after(sequence.sequence);
    const int64_t begin = sequence.cuts[thread + 1], end = sequence.summarized_to(thread + 1);
    std::vector<Summary> summaries((end - begin + kBlock - 1) / kBlock);
    for (int64_t k = static_cast<int64_t>(summaries.size()) - 1; k >= 0; --k) {  // forwards takes twice as long
      const int64_t at = begin + k * kBlock;
      summaries[k] = on.summarize(call, at, std::min(end, at + kBlock));
    }
    Carry carry = wait_for(sequence, thread + 1);
    for (auto block = summaries.rbegin(); block != summaries.rend(); ++block)
      carry = across(call.discount, *block, carry);
    return carry;
  }

  Carry wait_for(const Shared& sequence, int64_t thread) const {
    const Handover& given = sequence.given[thread];
    for (int64_t patience = 0; patience < 1'000'000; ++patience) {
      if (given.ready.load(std::memory_order_acquire)) return given.carry;
    }
    // The other thread may be suspended, or not exist. Its result can be computed without it.
    const int64_t from = sequence.summarized_to(thread), end = starts[sequence.sequence + 1];
    Carry carry = after(sequence.sequence);
    for (int64_t at = from + (end - from - 1) / kBlock * kBlock; at >= from; at -= kBlock) {
      carry = across(call.discount, on.summarize(call, at, std::min(end, at + kBlock)), carry);
    }
    return carry;
  }

  Carry after(int64_t s) const { return {0.0, call.bootstrap == nullptr ? 0.0 : call.bootstrap[s]}; }
};

template <typename T>
void run(const Call<T>& call, const std::vector<int64_t>& starts) {
  const int64_t useful = std::max<int64_t>(1, starts.back() / kGrain);
  Batch<T> batch(call, starts, std::min<int64_t>(torch::stable::get_num_threads(), useful));
  if (batch.threads == 1) return batch.work(0);
  torch::stable::parallel_for(0, batch.threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = end - 1; thread >= begin; --thread) batch.work(thread);
  });
}

template <typename Int>
std::vector<int64_t> checked_starts(const Tensor& cu_seqlens, int64_t tokens) {
  const Int* data = static_cast<const Int*>(cu_seqlens.data_ptr());
  const std::vector<int64_t> starts(data, data + cu_seqlens.size(0));
  REQUIRE(starts.front() == 0 && starts.back() == tokens, "cu_seqlens runs from ", starts.front(), " to ",
          starts.back(), "; expected 0 to ", tokens, ", the length of rewards");
  for (size_t i = 1; i < starts.size(); ++i) {
    REQUIRE(starts[i] >= starts[i - 1], "cu_seqlens falls from ", starts[i - 1], " to ", starts[i], " at index ", i,
            "; it must never fall");
  }
  return starts;
}

template <typename T>
const T* data_of(const std::optional<Tensor>& x) {
  return x.has_value() ? static_cast<const T*>(x->data_ptr()) : nullptr;
}

Tensor run_gae(const Tensor& rewards, const Tensor& values, const Tensor& cu_seqlens, double gamma, double lam,
               const std::optional<Tensor>& bootstrap, const std::optional<Tensor>& mask) {
  const gae::Arguments arguments{rewards, values, cu_seqlens, gamma, lam, bootstrap, mask};
  arguments.check();
  const int64_t tokens = arguments.tokens();
  const std::vector<int64_t> starts = cu_seqlens.scalar_type() == ScalarType::Int
                                          ? checked_starts<int32_t>(cu_seqlens, tokens)
                                          : checked_starts<int64_t>(cu_seqlens, tokens);
  Tensor out = torch::stable::new_empty(rewards, {2, tokens}, ScalarType::Float);
  float* const advantages = static_cast<float*>(out.data_ptr());
  const auto launch = [&]<typename T>(T) {
    run(Call<T>{static_cast<const T*>(rewards.data_ptr()), static_cast<const T*>(values.data_ptr()),
                data_of<float>(bootstrap), data_of<uint8_t>(mask), advantages, advantages + tokens,
                discount_of(gamma, lam)},
        starts);
  };
  rewards.scalar_type() == ScalarType::Float ? launch(float{}) : launch(BFloat16{});
  return out;
}

}  // namespace
}  // namespace fastppo

// For t = T-1, ..., 0 of each sequence, with V_T = bootstrap (0 without) and A_T = 0:
//   delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, return_t = A_t + V_t;
// a token whose mask is false is skipped: t+1 is the next unmasked token, and the outputs of a masked token are 0.
//   rewards, values (M,) fp32 or bf16; cu_seqlens (B+1,) int32 or int64, from 0 to M
//   bootstrap (B,) fp32; mask (M,) bool
// Returns advantages and returns as rows of one tensor, (2, M) fp32: the allocator reuses one block, but would return
// two to the system at each call. The result of a sequence depends on that sequence only, bit for bit.
STABLE_TORCH_LIBRARY_FRAGMENT(fastppo, m) {
  m.def(
      "gae(Tensor rewards, Tensor values, Tensor cu_seqlens, float gamma, float lam, Tensor? bootstrap=None, "
      "Tensor? mask=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastppo, CPU, m) { m.impl("gae", TORCH_BOX(&fastppo::run_gae)); }
