// Plain data that every layer shares: element types, ISA levels, the status of a call. POD only: the ISA files, each
// compiled for its own instruction set, include it and must not emit a symbol for it.
#pragma once
#include <cstdint>

namespace refine_fast {

enum class Dtype : int32_t { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

// Slowest first on each architecture. A level implies those before it; neon follows scalar directly.
enum class Isa : int32_t { scalar = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4, neon = 5 };

enum class Code : int32_t { ok = 0, invalid = 1, io = 2, no_memory = 3, interrupted = 4 };

// The result of a core function. The bindings turn it into an exception; `message` is one sentence for the user.
struct Status {
  Code code = Code::ok;
  char message[1000] = {};
  explicit operator bool() const { return code == Code::ok; }
};

// Called about every 50 ms on the calling thread: whether to continue.
struct Poll {
  bool (*go_on)(void* context) = nullptr;
  void* context = nullptr;
};

}  // namespace refine_fast
