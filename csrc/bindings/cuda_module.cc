// refine_fast._cuda: the CUDA kernels for Python. Addresses and streams arrive as integers; a CUDA error becomes an
// exception with its text. The runtime is linked statically and looks for a driver only when a kernel is launched, so
// the module imports on any machine.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda/band_topk.h"
#include "cuda/lerp.h"
#ifdef REFINE_FAST_EMULATE_CUDA
#include "machine.h"
#endif

namespace py = pybind11;
namespace rf = refine_fast;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void raise_unless_ok(int status) {
  if (status != 0) throw std::runtime_error(std::string("CUDA error: ") + refine_fast_cuda_error(status));
}

// Raises with the same sentences as csrc/core/band_topk.cc.
void raise_if_bad(uint64_t row, const char* what) {
  if (row == rf::kNoBadRow) return;
  const char* problem = row % 2 == 0 ? "holds NaN or Inf; leave such rows out"
                                     : "has a norm above 1e18; scale the rows, or pass normalize=True";
  throw std::invalid_argument("row " + std::to_string(row / 2) + " of " + what + " " + problem);
}

rf::CudaBand band(int64_t d, int64_t k, int64_t skip, double lo, bool random, uint64_t seed, bool band_first,
                  bool normalize, int64_t block) {
  rf::CudaBand band = {};
  band.d = d, band.k = k, band.skip = skip, band.lo = lo, band.random = random, band.seed = seed,
  band.band_first = band_first;
  band.normalize = normalize, band.block = block;
  return band;
}

void begin(rf::CudaBand& band, int64_t first, int64_t rows, uintptr_t hi, uintptr_t offsets, uintptr_t ids,
           uintptr_t workspace, uintptr_t stream, uintptr_t queries, int dtype, int64_t row_stride) {
  band.first = first, band.rows = rows, band.hi = pointer<double>(hi), band.offsets = pointer<int64_t>(offsets),
  band.ids = pointer<int64_t>(ids);
  band.workspace = pointer<void>(workspace), band.stream = pointer<void>(stream);
  uint64_t bad = rf::kNoBadRow;
  raise_unless_ok(refine_fast_cuda_band_set_queries(&band, pointer<void>(queries), rf::Dtype{dtype}, row_stride, &bad));
  raise_if_bad(bad, "queries");
}

void push(rf::CudaBand& band, uintptr_t docs, int dtype, int64_t row_stride, int64_t rows, int64_t first_id) {
  uint64_t bad = rf::kNoBadRow;
  raise_unless_ok(
      refine_fast_cuda_band_push(&band, pointer<void>(docs), rf::Dtype{dtype}, row_stride, rows, first_id, &bad));
  raise_if_bad(bad, "docs");
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  // --- lerp (fuse_into)
  m.def(
      "lerp",
      [](uintptr_t base, int base_type, uintptr_t tuned, int tuned_type, int64_t n, double weight, uintptr_t stream) {
        raise_unless_ok(refine_fast_cuda_lerp(pointer<void>(base), rf::Dtype{base_type}, pointer<void>(tuned),
                                              rf::Dtype{tuned_type}, n, weight, pointer<void>(stream)));
      },
      no_gil);
  // --- band_topk
  py::class_<rf::CudaBand>(m, "BandSearch")
      .def(py::init(&band), py::arg("d"), py::arg("k"), py::arg("skip"), py::arg("lo"), py::arg("random"),
           py::arg("seed"), py::arg("band_first"), py::arg("normalize"), py::arg("block"))
      .def("bytes",
           [](rf::CudaBand band, int64_t rows) {
             band.rows = rows;
             return refine_fast_cuda_band_bytes(&band);
           })
      .def("begin", begin, no_gil)
      .def("push", push, no_gil)
      .def(
          "finish",
          [](const rf::CudaBand& band, uintptr_t ids, uintptr_t scores, uintptr_t in_band) {
            raise_unless_ok(refine_fast_cuda_band_finish(&band, pointer<int64_t>(ids), pointer<float>(scores),
                                                         pointer<int64_t>(in_band)));
          },
          no_gil)
      .def(
          "finish_part",
          [](const rf::CudaBand& band, uintptr_t ids, uintptr_t scores, uintptr_t drawn_ids, uintptr_t drawn_scores,
             uintptr_t above, uintptr_t in_band) {
            const rf::CudaBandPart part = {pointer<int64_t>(ids),       pointer<double>(scores),
                                           pointer<int64_t>(drawn_ids), pointer<double>(drawn_scores),
                                           pointer<int64_t>(above),     pointer<int64_t>(in_band)};
            raise_unless_ok(refine_fast_cuda_band_finish_part(&band, &part));
          },
          no_gil);
#ifdef REFINE_FAST_EMULATE_CUDA
  // order: the seed of a shuffle, negative for no shuffle
  m.def("emulate", [](int processors, int shared_bytes, int64_t order) {
    emulated::device.processors = processors, emulated::device.shared_bytes = shared_bytes,
    emulated::device.shuffled = order >= 0;
    emulated::device.order.seed(static_cast<unsigned>(order));
  });
#endif
}
