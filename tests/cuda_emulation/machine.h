// The CUDA execution model on one CPU thread, so that the sources of csrc/cuda run, and are tested, without a GPU:
// cmake -DREFINE_FAST_EMULATE_CUDA=ON compiles them as C++ against this folder, which stands in for the toolkit's
// headers and for cuda/ptx.h.
//
// Every CUDA thread of a block is a fiber. It runs until it waits for others (a barrier, a warp-wide operation); then
// the next one resumes, in an order that Device::shuffled mixes. The blocks of a grid run one after the other, in mixed
// order too. So a missing barrier shows as a wrong result in some order; a barrier that not every thread reaches, or a
// warp-wide operation that some lane leaves out, is an error. Memory is the host's, dynamic shared memory starts as
// NaN, and asynchronous copies happen as late as the program allows, or at once.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace emulated {

constexpr int kWarp = 32, kMaxThreads = 1024;
constexpr size_t kStackBytes = 128 << 10;

// Settings for tests.
struct Device {
  int processors = 3, shared_bytes = 163 << 10;
  bool shuffled = false;
  std::mt19937 order;
};
inline Device device;
inline std::string failure;  // of the last launch that failed

// __builtin_setjmp and __builtin_longjmp switch stacks in a few instructions; GCC requires them in different functions.
using Place = void* [5];
[[noreturn, gnu::noinline]] inline void go_to(Place& place) { __builtin_longjmp(place, 1); }

class Machine {
 public:
  // Runs body for every thread of every block; returns false and sets `failure` if it breaks a rule.
  bool run(unsigned blocks, unsigned threads, size_t shared_bytes, std::function<void()> body,
           std::function<void(int block, int thread)> at) {
    body_ = std::move(body), at_ = std::move(at), failed_ = false;
    while (threads_.size() < threads) threads_.push_back(std::make_unique<Thread>());
    warps_.resize(threads / kWarp);
    for (unsigned index : order_of(blocks)) {
      block_ = static_cast<int>(index);
      shared_.assign(shared_bytes + 128, 0xff);
      run_block(threads);
      if (failed_) return false;
    }
    return true;
  }

  unsigned char* shared() { return shared_.data() + (128 - reinterpret_cast<uintptr_t>(shared_.data()) % 128); }

  // Checks an address that an instruction is given.
  void check_shared(const void* p, size_t bytes) {
    const auto* at = static_cast<const unsigned char*>(p);
    if (at < shared() || at + bytes > shared() + shared_.size() - 128)
      fail("an address outside of dynamic shared memory");
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail("a misaligned address in shared memory");
  }

  void barrier() {
    ++progress_;
    if (++waiting_ == static_cast<int>(order_.size()))
      waiting_ = 0, ++generation_;
    else
      for (const uint64_t mine = generation_; generation_ == mine;) yield();
    asm volatile("" ::: "memory");
  }

  // A warp-wide operation: when the last lane arrives, compute reads every in[lane] and writes every out[lane].
  void together(const void* in, void* out, void (*compute)(const void* const* in, void* const* out)) {
    Warp& warp = warps_[current_ / kWarp];
    if (warp.arrived > 0 && warp.compute != compute) fail("lanes of one warp are at different warp-wide operations");
    ++progress_;
    warp.compute = compute, warp.in[current_ % kWarp] = in, warp.out[current_ % kWarp] = out;
    if (++warp.arrived == kWarp)
      warp.arrived = 0, compute(warp.in, warp.out), ++warp.generation;
    else
      for (const uint64_t mine = warp.generation; warp.generation == mine;) yield();
    asm volatile("" ::: "memory");
  }

  void copy_async(void* to, const void* from) {
    check_shared(to, 16);
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("a misaligned asynchronous copy");
    if (device.shuffled && device.order() % 2 == 0) {  // or as early as the hardware may
      std::memcpy(to, from, 16);
    } else {
      threads_[current_]->copies.push_back({to, from}), ++threads_[current_]->last_group;
    }
  }
  void copy_async_commit() {
    Thread& self = *threads_[current_];
    self.groups.push_back(std::exchange(self.last_group, 0));
  }
  void copy_async_wait(size_t pending) {
    for (Thread& self = *threads_[current_]; self.groups.size() > pending; self.groups.pop_front())
      for (; self.groups.front() > 0; --self.groups.front(), self.copies.pop_front())
        std::memcpy(self.copies.front().to, self.copies.front().from, 16);
  }

  [[noreturn]] void fail(const char* what) {
    failure = std::string("emulated CUDA: ") + what, failed_ = true;
    go_to(main_);
  }

 private:
  struct Warp {
    int arrived = 0;
    uint64_t generation = 0;
    void (*compute)(const void* const*, void* const*) = nullptr;  // the same for all lanes
    const void* in[kWarp];
    void* out[kWarp];
  };
  struct Copy {
    void* to;
    const void* from;
  };
  struct Thread {
    Place place;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    ucontext_t start;
    bool started = false, done = true;
    std::deque<Copy> copies;  // asynchronous, not performed
    std::deque<int> groups;   // the size of each committed group, oldest first
    int last_group = 0;       // copies not yet committed
  };

  static std::vector<unsigned> order_of(unsigned count) {
    std::vector<unsigned> order(count);
    for (unsigned i = 0; i < count; ++i) order[i] = i;
    if (device.shuffled) std::shuffle(order.begin(), order.end(), device.order);
    return order;
  }

  [[gnu::noinline]] void run_block(unsigned threads) {
    order_ = order_of(threads);
    std::fill(warps_.begin(), warps_.end(), Warp{});
    waiting_ = 0, held_ = -1, running_ = static_cast<int>(threads), turn_ = order_.size() - 1,
    last_progress_ = progress_++;
    for (unsigned i = 0; i < threads; ++i)
      threads_[i]->done = false, threads_[i]->copies.clear(), threads_[i]->groups.clear(), threads_[i]->last_group = 0;
    if (__builtin_setjmp(main_) == 0) resume_next();
    if (failed_)  // threads stopped in the middle of the kernel never resume
      for (auto& thread : threads_) thread->started = false;
  }

  [[gnu::noinline]] void yield() {
    if (__builtin_setjmp(threads_[current_]->place) == 0) resume_next();
  }

  // Resumes the next thread, or returns to run_block when all are done.
  [[noreturn, gnu::noinline]] void resume_next() {
    if (running_ == 0) go_to(main_);
    do {
      if (++turn_ == order_.size()) {
        const bool stuck = std::exchange(last_progress_, progress_) == progress_;
        if (stuck && held_ < 0) fail("threads wait for others that do not come");
        if (stuck || !device.shuffled)
          held_ = -1;
        else if (held_ < 0)
          held_ = static_cast<int>(device.order() % warps_.size());
        turn_ = 0;
      }
      current_ = order_[turn_];
    } while (threads_[current_]->done || static_cast<int>(current_) / kWarp == held_);
    at_(block_, static_cast<int>(current_));
    Thread& next = *threads_[current_];
    if (next.started) go_to(next.place);
    next.started = true;
    getcontext(&next.start);
    next.start.uc_stack.ss_sp = next.stack.get(), next.start.uc_stack.ss_size = kStackBytes;
    const auto self = reinterpret_cast<uintptr_t>(this);
    makecontext(&next.start, reinterpret_cast<void (*)()>(&Machine::live), 2, static_cast<unsigned>(self >> 32),
                static_cast<unsigned>(self));
    setcontext(&next.start);
    __builtin_unreachable();
  }

  static void live(unsigned high, unsigned low) {
    auto* const machine = reinterpret_cast<Machine*>(static_cast<uintptr_t>(high) << 32 | low);
    for (;;) {
      machine->body_();
      machine->threads_[machine->current_]->done = true;
      ++machine->progress_, --machine->running_;
      machine->yield();
    }
  }

  std::function<void()> body_;
  std::function<void(int, int)> at_;  // sets blockIdx and threadIdx
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Warp> warps_;
  std::vector<unsigned> order_;
  std::vector<unsigned char> shared_;
  Place main_;
  int block_ = 0, waiting_ = 0, running_ = 0;
  int held_ = -1;  // a warp that waits until no other can run, so that warps drift apart as far as barriers allow
  size_t turn_ = 0, current_ = 0;
  uint64_t generation_ = 0, progress_ = 0, last_progress_ = 0;
  bool failed_ = false;
};

inline Machine machine;

}  // namespace emulated
