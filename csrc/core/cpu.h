// Which ISA level runs. The levels of the machine are detected once: CPUID, the state that the system saves (XCR0),
// permission for AMX. The best one runs unless REFINE_FAST_ISA or isa_force names another.
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
// whether the level was compiled in, the CPU has it and the system permits it
bool isa_available(Isa isa);
Isa isa_best();
// The level in use; throws IsaSettingError if REFINE_FAST_ISA names an unknown or unavailable level
Isa isa_current();
void isa_force(Isa isa);
// the table of the level in use; only what its comment says may be null is
const Kernels& kernels();

}  // namespace refine_fast
