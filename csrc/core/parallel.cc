#include "core/parallel.h"

#include <pthread.h>

namespace refine_fast {
namespace {

// Constant-initialized: a child may be forked at any time.
bool forked = false;

// Registered when the library is loaded, before anything here uses the pool. Whether torch has used it, nobody can ask.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

bool in_forked_child() { return forked; }

}  // namespace refine_fast
