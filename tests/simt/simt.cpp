// The fibers behind simt.h.
#include "simt.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <unordered_set>
#include <utility>
#include <vector>

// SIMT_RACES: the kernels are compiled with -fsanitize=thread.
#ifdef SIMT_RACES
#include <sanitizer/tsan_interface.h>
#endif

namespace simt {
namespace {

constexpr int kStackBytes = 256 << 10;
constexpr int kWarp = 32;

[[noreturn]] void stop(const char* what, const void* address = nullptr) {
  std::fprintf(stderr, "simt: block %u, thread %u: %s %p\n", block_index().x, thread_index().x, what, address);
  std::abort();
}

struct Barrier {
  int64_t arrived = 0, passed = 0;  // threads at the barrier; times it opened
  int64_t edges[2];                 // addresses that tell the sanitizer what happened before what, by turns
};

struct Warp {
  Barrier barrier, exchange;
  uint64_t values[2][kWarp];  // by turns: a lane may be at the next exchange before others have read this one
  // What its lanes have read since they last met: an address that they share is read once.
  std::unordered_set<const void*> read;
  int64_t meetings = 0;
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  ucontext_t context;
  jmp_buf jump;
  bool started = false, done = true;
#ifdef SIMT_RACES
  void* sanitizer = __tsan_create_fiber(0);
#endif
};

std::vector<std::unique_ptr<Fiber>> fibers;
Fiber scheduler;
int current = -1;  // -1: the scheduler
int64_t block = 0, events = 0;
int threads = 0, alive = 0;
const std::function<void()>* body = nullptr;
Barrier whole_block;
int64_t started, finished;  // a block's edges, as those of a barrier
std::vector<Warp> warps;

std::vector<std::pair<const char*, const char*>> allowed;
Traffic total{0, 0};

#ifdef SIMT_RACES
void acquire(int64_t& edge) { __tsan_acquire(&edge); }
void release(int64_t& edge) { __tsan_release(&edge); }
void change(Fiber& from, Fiber& to) {
  __tsan_switch_to_fiber(to.sanitizer, __tsan_switch_to_fiber_no_sync);
  swapcontext(&from.context, &to.context);
}
#else
void acquire(int64_t&) {}
void release(int64_t&) {}
void change(Fiber& from, Fiber& to) {  // a jump makes no system call, but only a context can begin on a new stack
  if (_setjmp(from.jump) != 0) return;
  if (to.started) _longjmp(to.jump, 1);
  to.started = true;
  setcontext(&to.context);
}
#endif

void change_to(int next) {
  Fiber& from = current < 0 ? scheduler : *fibers[current];
  Fiber& to = next < 0 ? scheduler : *fibers[next];
  current = next;
  change(from, to);
}

void open(Barrier& barrier) {
  barrier.arrived = 0;
  ++barrier.passed;
  ++events;
}

void wait(Barrier& barrier, int expected, bool orders_memory) {
  const int64_t turn = barrier.passed;
  if (orders_memory) release(barrier.edges[turn % 2]);
  if (++barrier.arrived == expected) open(barrier);
  while (barrier.passed == turn) change_to(-1);
  if (orders_memory) acquire(barrier.edges[turn % 2]);
}

void live() {
  for (;;) {
    acquire(started);
    (*body)();
    release(finished);
    fibers[current]->done = true;
    ++events;
    // On a GPU too, a thread that has returned is not waited for.
    if (--alive > 0 && whole_block.arrived == alive) open(whole_block);
    change_to(-1);
  }
}

void hire(int count) {
  while (static_cast<int>(fibers.size()) < count) {
    fibers.push_back(std::make_unique<Fiber>());
    ucontext_t& context = fibers.back()->context;
    getcontext(&context);
    context.uc_stack = {fibers.back()->stack.get(), 0, kStackBytes};
    context.uc_link = nullptr;
    makecontext(&context, &live, 0);
  }
}

void run_block() {
  whole_block = {};
  warps.assign((threads + kWarp - 1) / kWarp, {});
  alive = threads;
  for (int i = 0; i < threads; ++i) fibers[i]->done = false;
  release(started);
  while (alive > 0) {
    const int64_t before = events;
    for (int i = 0; i < threads; ++i) {
      if (!fibers[i]->done) change_to(i);
    }
    if (events == before) stop("waits for threads that do not come");
  }
  acquire(finished);
}

}  // namespace

Index thread_index() { return {static_cast<unsigned>(current)}; }
Index block_index() { return {static_cast<unsigned>(block)}; }
int lane() { return current % kWarp; }

void run(int64_t blocks, int threads_of_block, bool backwards, const std::function<void()>& thread) {
  scheduler.started = true;
#ifdef SIMT_RACES
  scheduler.sanitizer = __tsan_get_current_fiber();
#endif
  threads = threads_of_block;
  body = &thread;
  hire(threads);
  for (int64_t i = 0; i < blocks; ++i) {
    block = backwards ? blocks - 1 - i : i;
    run_block();
  }
}

void block_barrier() { wait(whole_block, alive, true); }

void warp_barrier(unsigned lanes) { wait(warps[current / kWarp].barrier, __popc(lanes), true); }

uint64_t exchange(unsigned lanes, uint64_t value, int from_lane) {
  Warp& warp = warps[current / kWarp];
  auto& values = warp.values[warp.exchange.passed % 2];
  values[lane()] = value;
  wait(warp.exchange, __popc(lanes), false);
  return values[from_lane];
}

unsigned ballot(unsigned lanes, bool vote) {
  const auto& values = warps[current / kWarp].values[warps[current / kWarp].exchange.passed % 2];
  exchange(lanes, vote, lane());
  unsigned votes = 0;
  for (int i = 0; i < kWarp; ++i) votes |= static_cast<unsigned>((lanes >> i & 1) != 0 && values[i] != 0) << i;
  return votes;
}

void count(const void* address, int64_t bytes, bool written) {
  const char* const begin = static_cast<const char*>(address);
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) stop("accesses memory that is not aligned", address);
  bool inside = false;
  for (const auto& [from, to] : allowed) inside |= from <= begin && begin + bytes <= to;
  if (!inside) stop("accesses memory out of bounds", address);
#ifndef SIMT_RACES  // whose sanitizer watches the set's memory
  Warp& warp = warps[current / kWarp];
  const int64_t meetings = warp.barrier.passed + warp.exchange.passed + whole_block.passed;
  if (std::exchange(warp.meetings, meetings) != meetings) warp.read.clear();
  if (written) total.written += bytes;
  if (!written && warp.read.insert(address).second) total.read += bytes;
#endif
}

Traffic traffic() { return total; }
void allow(const void* begin, int64_t bytes) {
  allowed.emplace_back(static_cast<const char*>(begin), static_cast<const char*>(begin) + bytes);
}
void allow_nothing() { allowed.clear(); }

}  // namespace simt
