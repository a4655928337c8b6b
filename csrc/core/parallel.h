// The only file that includes OpenMP. torch ships libgomp under its plain name, so an extension built with -fopenmp shares torch's pool;
// the caller still passes the number of threads (torch.get_num_threads()), so that nothing here is hidden.
#pragma once
#include <omp.h>

#include <cstdint>

namespace refine_fast {

// body(task, thread) for each task in [0, tasks), handed out one at a time. The result must not depend on which thread runs a task.
template <class Body>
void parallel_for(int64_t tasks, int threads, const Body& body) {
  if (threads <= 1 || tasks <= 1) {
    for (int64_t t = 0; t < tasks; ++t) body(t, 0);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < tasks; ++t) body(t, thread);
  }
}

}  // namespace refine_fast
