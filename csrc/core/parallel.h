// Loops over threads, and the only file that includes OpenMP. torch ships libgomp under its plain name, so an extension
// built with -fopenmp shares torch's pool; the caller still passes the number of threads (torch.get_num_threads()), so
// that nothing here is hidden. Without OpenMP (Apple's clang) the threads are std::thread's.
#pragma once
#if defined(_OPENMP)
#include <omp.h>
#else
#include <thread>
#include <vector>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

#include "core/stages.h"

namespace refine_fast {

// Whether this process was forked from one that had loaded this library. The OpenMP pool of the parent does not survive
// a fork: its threads are gone, and libgomp would wait for them for ever.
bool in_forked_child();

// Carries an exception from the threads of a loop to its caller: one that left a thread would end the process.
class FirstException {
 public:
  // Does the work unless an earlier one failed: the loop has no result any more.
  template <class Work>
  void guard(const Work& work) {
    if (failed_.test(std::memory_order_relaxed)) return;
    try {
      work();
    } catch (...) {
      if (!failed_.test_and_set()) first_ = std::current_exception();
    }
  }
  // When all threads are done.
  void rethrow() const {
    if (first_) std::rethrow_exception(first_);
  }

 private:
  std::atomic_flag failed_;
  std::exception_ptr first_;
};

// body(task, thread) for each task in [0, tasks), handed out one at a time, in order; thread 0 is the caller's. The
// result must not depend on which thread runs a task. A forked child runs every task on the calling thread. The threads
// are in the stage that the caller is in; after its share of the tasks, the caller waits for the others. What a body
// throws, such as std::bad_alloc, the caller gets.
template <class Body>
void parallel_for(int64_t tasks, int threads, const Body& body) {
  if (threads <= 1 || tasks <= 1 || in_forked_child()) {
    for (int64_t t = 0; t < tasks; ++t) body(t, 0);
    return;
  }
  const Stage stage = StageScope::current();
  const StageScope wait(Stage::wait);
  FirstException exception;
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
    const StageScope work(stage);
#pragma omp for schedule(monotonic : dynamic, 1) nowait
    for (int64_t t = 0; t < tasks; ++t) exception.guard([&] { body(t, thread); });
  }
#else
  std::atomic<int64_t> next{0};
  const auto work = [&](int thread) {
    const StageScope scope(stage);
    for (int64_t t; (t = next.fetch_add(1)) < tasks;) exception.guard([&] { body(t, thread); });
  };
  std::vector<std::thread> others;
  try {
    for (int thread = 1; thread < std::min<int64_t>(threads, tasks); ++thread) others.emplace_back(work, thread);
  } catch (const std::exception&) {  // no more threads or memory to be had: those that started share the work
  }
  work(0);
  for (std::thread& other : others) other.join();
#endif
  exception.rethrow();
}

}  // namespace refine_fast
