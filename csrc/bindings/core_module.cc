// refine_fast._core: the CPU core for Python. Tensors arrive as integers (addresses, sizes), the GIL is released around the work, and a
// Status becomes an exception. No torch header: one build serves every torch version.
#include <pybind11/pybind11.h>

#include <string>

#include "core/cpu.h"

namespace py = pybind11;
namespace rf = refine_fast;

namespace {

// ValueError, OSError, MemoryError or KeyboardInterrupt, with the core's sentence
[[maybe_unused]] void raise_unless_ok(const rf::Status& status) {
  switch (status.code) {
    case rf::Code::ok: return;
    case rf::Code::invalid: throw py::value_error(status.message);
    case rf::Code::io: PyErr_SetString(PyExc_OSError, status.message); break;
    case rf::Code::no_memory: PyErr_SetString(PyExc_MemoryError, status.message); break;
    case rf::Code::interrupted: PyErr_SetNone(PyExc_KeyboardInterrupt); break;
  }
  throw py::error_already_set();
}

rf::Isa parse_isa(const std::string& name) {
  const rf::Isa* isa = rf::isa_from_name(name.c_str());
  if (isa == nullptr) throw py::value_error("unknown ISA level " + name + "; the levels are scalar, avx2, avx512, avx512_bf16, amx and neon");
  if (!rf::isa_available(*isa)) throw py::value_error("this machine does not have the ISA level " + name);
  return *isa;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  // --- ISA levels
  m.def("isa", [] { return rf::isa_name(rf::isa_current()); });
  m.def("force_isa", [](const std::string& name) { rf::isa_force(parse_isa(name)); });
  m.def("available_isas", [] {
    py::list names;
    for (rf::Isa isa : {rf::Isa::scalar, rf::Isa::avx2, rf::Isa::avx512, rf::Isa::avx512_bf16, rf::Isa::amx, rf::Isa::neon})
      if (rf::isa_available(isa)) names.append(rf::isa_name(isa));
    return names;
  });
  // --- lerp and stream (fuse)
  // --- band_topk
  // --- info_nce
}
