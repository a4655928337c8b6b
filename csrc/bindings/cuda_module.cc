// refine_fast._cuda: the CUDA kernels for Python. Addresses and streams arrive as integers, a CUDA error becomes an exception with its text.
// The runtime is linked statically and looks for a driver only when a kernel is launched: the module imports anywhere.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda/lerp.h"

namespace py = pybind11;
namespace rf = refine_fast;

namespace {

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

void raise_unless_ok(int status) {
  if (status != 0) throw std::runtime_error(std::string("CUDA error: ") + refine_fast_cuda_error(status));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.def("lerp", [](uintptr_t base, int base_type, uintptr_t tuned, int tuned_type, int64_t n, double weight, uintptr_t stream) {
    raise_unless_ok(refine_fast_cuda_lerp(pointer(base), rf::Dtype{base_type}, pointer(tuned), rf::Dtype{tuned_type}, n, weight, pointer(stream)));
  }, py::call_guard<py::gil_scoped_release>());
}
