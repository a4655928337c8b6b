// Which ISA level runs: detected once (CPUID, the state that the OS saves (XCR0), permission for AMX), forced by REFINE_FAST_ISA or set_isa.
#pragma once
#include <stdexcept>

#include "kernels/kernels.h"

namespace refine_fast {

// REFINE_FAST_ISA names no level of this machine. The message is one sentence for the user.
struct IsaSettingError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

const char* isa_name(Isa isa);
// null for an unknown name
const Isa* isa_from_name(const char* name);
// a level that was compiled in, that the CPU has and that the OS lets us use
bool isa_available(Isa isa);
Isa isa_best();
// the level in force; throws IsaSettingError if REFINE_FAST_ISA names an unknown or unavailable level
Isa isa_current();
void isa_force(Isa isa);
// the complete table of the level in force: no null pointer
const Kernels& kernels();

}  // namespace refine_fast
