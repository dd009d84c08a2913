// The fibers behind simt.h.
#include "simt.h"

#include <setjmp.h>
#include <ucontext.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
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
constexpr int64_t kPatience = 1000;  // rounds without progress of each place

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
  std::unique_ptr<char[]> stack;
  ucontext_t context;
  jmp_buf jump;
  bool started = false, done = true;
#ifdef SIMT_RACES
  void* sanitizer = nullptr;
#endif
};

// A place on the simulated GPU, where one block after another runs. Each is a thread of the machine, so that each has
// its own shared memory, but they take turns, one at a time.
struct Place {
  std::vector<std::unique_ptr<Fiber>> fibers;
  Fiber scheduler;
  int number = 0;
  int current = -1;  // -1: the scheduler
  int64_t block = 0, events = 0;
  bool asleep = false;  // a thread has waited for another block in this round
  int alive = 0;
  Barrier whole_block;
  int64_t started, finished;  // a block's edges, as those of a barrier
  std::vector<Warp> warps;
};
thread_local Place place;

// Of a launch. Only the place whose turn it is uses them.
const std::function<void()>* body = nullptr;
Grid grid;
int64_t begun = 0;          // blocks
std::vector<bool> working;  // by place
std::atomic<int> turn = 0;
uint64_t random_state = 0;
int64_t idle_rounds = 0;  // in a row, of any place

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
  Fiber& from = place.current < 0 ? place.scheduler : *place.fibers[place.current];
  Fiber& to = next < 0 ? place.scheduler : *place.fibers[next];
  place.current = next;
  change(from, to);
}

void open(Barrier& barrier) {
  barrier.arrived = 0;
  ++barrier.passed;
  ++place.events;
}

void wait(Barrier& barrier, int expected, bool orders_memory) {
  const int64_t time = barrier.passed;
  if (orders_memory) release(barrier.edges[time % 2]);
  if (++barrier.arrived == expected) open(barrier);
  while (barrier.passed == time) change_to(-1);
  if (orders_memory) acquire(barrier.edges[time % 2]);
}

void live() {
  for (;;) {
    acquire(place.started);
    (*body)();
    release(place.finished);
    place.fibers[place.current]->done = true;
    ++place.events;
    // On a GPU too, a thread that has returned is not waited for.
    if (--place.alive > 0 && place.whole_block.arrived == place.alive) open(place.whole_block);
    change_to(-1);
  }
}

void hire() {
  place.scheduler.started = true;
#ifdef SIMT_RACES
  place.scheduler.sanitizer = __tsan_get_current_fiber();
#endif
  while (static_cast<int>(place.fibers.size()) < grid.threads) {
    place.fibers.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *place.fibers.back();
    fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, kStackBytes};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &live, 0);
#ifdef SIMT_RACES
    fiber.sanitizer = __tsan_create_fiber(0);
#endif
  }
}

int drawn(int below) {  // a linear congruential generator: the same schedule for the same seed
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<int>((random_state >> 33) % below);
}

void wait_for_turn() {
  for (int now; (now = turn.load()) != place.number;) turn.wait(now);
}

// Lets another place go on, if there is one.
void pass_on() {
  std::vector<int> others;
  for (int i = 0; i < grid.places; ++i) {
    if (working[i] && i != place.number) others.push_back(i);
  }
  if (others.empty()) return;
  turn = others[drawn(static_cast<int>(others.size()))];
  turn.notify_all();
}

void run_block() {
  place.whole_block = {};
  place.warps.assign((grid.threads + kWarp - 1) / kWarp, {});
  place.alive = grid.threads;
  for (int i = 0; i < grid.threads; ++i) place.fibers[i]->done = false;
  release(place.started);
  while (place.alive > 0) {
    const int64_t before = place.events;
    place.asleep = false;
    for (int i = 0; i < grid.threads; ++i) {
      if (!place.fibers[i]->done) change_to(i);
    }
    const bool idle = place.events == before;
    if (idle && !place.asleep) stop("waits for threads that do not come");
    idle_rounds = idle ? idle_rounds + 1 : 0;
    if (idle_rounds > kPatience * grid.places) stop("waits for a block that does not come");
    if (idle || drawn(4) == 0) {
      pass_on();
      wait_for_turn();
    }
  }
  acquire(place.finished);
}

void work(int number) {
  place.number = number;
  wait_for_turn();
  hire();
  while (begun < grid.blocks) {
    place.block = grid.backwards ? grid.blocks - 1 - begun : begun;
    ++begun;
    run_block();
  }
  working[number] = false;
  pass_on();
}

}  // namespace

Index thread_index() { return {static_cast<unsigned>(place.current)}; }
Index block_index() { return {static_cast<unsigned>(place.block)}; }
int lane() { return place.current % kWarp; }

void run(const Grid& of_launch, const std::function<void()>& thread) {
  grid = of_launch;
  body = &thread;
  begun = idle_rounds = turn = 0;
  random_state = grid.seed;
  working.assign(grid.places, true);
  if (grid.places == 1) return work(0);
  std::vector<std::thread> places;
  for (int i = 0; i < grid.places; ++i) places.emplace_back(work, i);
  for (std::thread& one : places) one.join();
}

void sleep() {
  place.asleep = true;
  change_to(-1);
}

void block_barrier() { wait(place.whole_block, place.alive, true); }

void warp_barrier(unsigned lanes) { wait(place.warps[place.current / kWarp].barrier, __popc(lanes), true); }

uint64_t exchange(unsigned lanes, uint64_t value, int from_lane) {
  Warp& warp = place.warps[place.current / kWarp];
  auto& values = warp.values[warp.exchange.passed % 2];
  values[lane()] = value;
  wait(warp.exchange, __popc(lanes), false);
  return values[from_lane];
}

unsigned ballot(unsigned lanes, bool vote) {
  const Warp& warp = place.warps[place.current / kWarp];
  const auto& values = warp.values[warp.exchange.passed % 2];
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
  Warp& warp = place.warps[place.current / kWarp];
  const int64_t meetings = warp.barrier.passed + warp.exchange.passed + place.whole_block.passed;
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
