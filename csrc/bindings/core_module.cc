// refine_fast._core: the CPU core for Python. Tensors arrive as integers (addresses, sizes), the GIL is released during
// the work, and a Status becomes an exception. No torch header, so that one build serves every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "core/band_topk.h"
#include "core/best_of_groups.h"
#include "core/cpu.h"
#include "core/info_nce.h"
#include "core/lerp.h"
#include "core/matmul.h"
#include "core/memory.h"
#include "core/merge.h"
#include "core/stages.h"

namespace py = pybind11;
namespace rf = refine_fast;

namespace {

// Raises ValueError, OSError, MemoryError or KeyboardInterrupt with the core's message.
void raise_unless_ok(const rf::Status& status) {
  switch (status.code) {
    case rf::Code::ok: return;
    case rf::Code::invalid: throw py::value_error(status.message);
    case rf::Code::io:  // contains a path: arbitrary bytes, possibly truncated
      PyErr_SetObject(PyExc_OSError,
                      py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(status.message)).ptr());
      break;
    case rf::Code::no_memory: PyErr_SetString(PyExc_MemoryError, status.message); break;
    case rf::Code::interrupted:
      if (!PyErr_Occurred()) PyErr_SetNone(PyExc_KeyboardInterrupt);  // keeps what the signal handler raised
      break;
  }
  throw py::error_already_set();
}

rf::Isa parse_isa(const std::string& name) {
  const rf::Isa* isa = rf::isa_from_name(name.c_str());
  if (isa == nullptr)
    throw py::value_error("unknown ISA level " + name +
                          "; the levels are scalar, avx2, avx512, avx512_bf16, amx and neon");
  if (!rf::isa_available(*isa)) throw py::value_error("this machine does not have the ISA level " + name);
  return *isa;
}

// out (m, n) = a (m, k) b (k, n), float32, any strides (in elements), on one thread: the product inside info_nce and
// band_topk, for tests and benchmarks
void matmul(uintptr_t a, int64_t a_row, int64_t a_k, uintptr_t b, int64_t b_col, int64_t b_k, int64_t m, int64_t n,
            int64_t k, bool bf16, uintptr_t out) {
  const rf::MatmulKernels& kernels = bf16 ? *rf::kernels().matmul_bf16 : *rf::kernels().matmul_finite_f32;
  const int64_t size_a = rf::bytes_a(kernels, m, k);
  const rf::Buffer<char> panels(size_a + rf::bytes_b(kernels, n, k));
  rf::pack_a(kernels, reinterpret_cast<const float*>(a), a_row, a_k, m, k, panels.data());
  rf::pack_b(kernels, reinterpret_cast<const float*>(b), b_col, b_k, n, k, panels + size_a);
  rf::matmul(kernels, panels.data(), panels + size_a, m, n, k, reinterpret_cast<float*>(out), n, false);
}

// Whether no signal handler raised (Ctrl-C during a long call). Always true outside the main thread.
bool no_signal(void*) {
  py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() == 0;
}

rf::BandSpec band_spec(int64_t d, int64_t k, int64_t skip, double lo, bool random, uint64_t seed, bool band_first,
                       bool normalize, int threads, int64_t largest) {
  const auto order = band_first ? rf::Order::band_then_skip : rf::Order::skip_then_band;
  return {d, k, skip, lo, random, seed, order, normalize, threads, largest};
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// --- best_of_groups

void best_of_groups(uintptr_t queries, int64_t count, int64_t d, uintptr_t rows, int dtype, int64_t row_stride,
                    uintptr_t offsets, int64_t groups, uintptr_t best, int64_t best_stride, int threads) {
  rf::Status status;
  {
    py::gil_scoped_release release;
    status = rf::best_of_groups({pointer<const float>(queries),
                                 count,
                                 d,
                                 pointer<const void>(rows),
                                 static_cast<rf::Dtype>(dtype),
                                 row_stride,
                                 pointer<const int64_t>(offsets),
                                 groups,
                                 pointer<float>(best),
                                 best_stride,
                                 threads,
                                 {no_signal, nullptr}});
  }
  raise_unless_ok(status);
}

// --- lerp and merge (fuse)

void lerp_in_place(uintptr_t base, int base_type, uintptr_t tuned, int tuned_type, int64_t n, double weight) {
  py::gil_scoped_release release;
  const auto type = static_cast<rf::Storage>(base_type);
  auto* out = reinterpret_cast<void*>(base);
  rf::lerp(type, out, static_cast<rf::Storage>(tuned_type), reinterpret_cast<const void*>(tuned), type, out, n, weight,
           nullptr);
}

using FileTuple = std::tuple<int, std::string>;
using PieceTuple = std::tuple<int64_t, int, int, int, int, int64_t, int, int64_t, int>;
using FactorTuple = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, int64_t>;
using OutputTuple = std::tuple<int, std::string, int64_t, std::vector<double>>;

// Returns, for each output and piece: (sum of squares of the change, of the base, values that are not finite, bytes
// that differ)
py::list stream_merge(const std::vector<FileTuple>& files, const std::vector<PieceTuple>& pieces,
                      const std::vector<FactorTuple>& factors, const std::vector<OutputTuple>& outputs, bool overlap,
                      const py::function& on_block) {
  std::vector<rf::File> in;
  for (const auto& [fd, name] : files) in.push_back({fd, name});
  std::vector<rf::Piece> work;
  for (const auto& [count, base_type, tuned_type, out_type, base_file, base_offset, tuned_file, tuned_offset,
                    low_rank] : pieces)
    work.push_back({count, static_cast<rf::Storage>(base_type), static_cast<rf::Storage>(tuned_type),
                    static_cast<rf::Storage>(out_type), base_file, tuned_file, base_offset, tuned_offset, low_rank});
  std::vector<rf::LowRankFactors> low_rank;
  for (const auto& [a, b, rank, rows, cols] : factors)
    low_rank.push_back({reinterpret_cast<const float*>(a), reinterpret_cast<const float*>(b), rank, rows, cols});
  std::vector<rf::Output> out;
  for (const auto& [fd, name, offset, weights] : outputs) out.push_back({{fd, name}, offset, weights, {}});

  std::exception_ptr raised;
  rf::Status status;
  {
    py::gil_scoped_release release;
    status =
        rf::merge(in, work, low_rank, out, overlap, [&](int file, int64_t offset, const void* data, int64_t bytes) {
          py::gil_scoped_acquire acquire;
          try {
            if (PyErr_CheckSignals() != 0) throw py::error_already_set();
            on_block(file, offset, py::memoryview::from_memory(data, bytes));
            return true;
          } catch (...) {
            raised = std::current_exception();
            return false;
          }
        });
  }
  if (raised) std::rethrow_exception(raised);
  raise_unless_ok(status);
  py::list changes;
  for (const rf::Output& o : out) {
    py::list of_output;
    for (const rf::Change& c : o.changes)
      of_output.append(py::make_tuple(c.change_squared, c.base_squared, c.not_finite, c.differing));
    changes.append(of_output);
  }
  return changes;
}

// --- info_nce

void info_nce(uintptr_t q, uintptr_t d, uintptr_t hard, uintptr_t positives, uintptr_t doc_ids, uintptr_t hard_mask,
              uintptr_t coefficients, int64_t rows, int64_t columns, int64_t width, int64_t hards,
              const std::vector<int64_t>& prefixes, const std::vector<float>& prefix_weights, int dtype,
              float temperature, float margin, bool symmetric, bool normalize, int threads, uintptr_t loss,
              uintptr_t grad_q, uintptr_t grad_d, uintptr_t grad_hard, uintptr_t grad_temperature) {
  rf::InfoNCE task = {};
  task.q = pointer<void>(q), task.d = pointer<void>(d), task.hard = pointer<void>(hard);
  task.positives = pointer<int64_t>(positives), task.doc_ids = pointer<int64_t>(doc_ids),
  task.hard_mask = pointer<uint8_t>(hard_mask);
  task.coefficients = pointer<float>(coefficients);
  task.prefixes = prefixes.data(), task.prefix_weights = prefix_weights.data();
  task.rows = rows, task.columns = columns, task.width = width, task.hards = hards,
  task.prefix_count = static_cast<int64_t>(prefixes.size());
  task.dtype = static_cast<rf::Dtype>(dtype), task.temperature = temperature, task.margin = margin;
  task.symmetric = symmetric, task.normalize = normalize, task.threads = threads;
  task.loss = pointer<float>(loss), task.grad_q = pointer<float>(grad_q), task.grad_d = pointer<float>(grad_d);
  task.grad_hard = pointer<float>(grad_hard), task.grad_temperature = pointer<float>(grad_temperature);
  task.poll = {no_signal, nullptr};
  rf::Status status;
  {
    py::gil_scoped_release release;
    status = rf::info_nce(task);
  }
  raise_unless_ok(status);
}

// --- stages

std::unique_ptr<rf::StageScope> open_stage(const std::string& name) {
  rf::Stage stage;
  if (!rf::stage_from_name(name.c_str(), &stage)) throw py::value_error("no stage is called " + name);
  return std::make_unique<rf::StageScope>(stage);
}

// (by stage: (name, nanoseconds of the caller, of other threads); events: (name, thread, begin, end); events dropped)
py::tuple stop_stages() {
  const rf::StageRecord record = rf::stop_stages();
  py::list stages, events;
  for (int i = 0; i < rf::kStages; ++i)
    stages.append(py::make_tuple(rf::stage_name(static_cast<rf::Stage>(i)), record.caller[i], record.others[i]));
  for (const rf::StageEvent& e : record.events)
    events.append(py::make_tuple(rf::stage_name(e.stage), e.thread, e.begin, e.end));
  return py::make_tuple(stages, events, record.dropped);
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  // RefineFastError, whichever kernel runs first: the command line prints it without a traceback.
  py::register_local_exception_translator([](std::exception_ptr raised) {
    try {
      if (raised) std::rethrow_exception(raised);
    } catch (const rf::IsaSettingError& error) {
      PyErr_SetString(py::module_::import("refine_fast.errors").attr("RefineFastError").ptr(), error.what());
    } catch (const std::bad_alloc&) {
      PyErr_SetString(PyExc_MemoryError, "no memory for the working buffers of a refine_fast operation");
    }
  });
  // --- ISA levels
  m.def("isa", [] { return rf::isa_name(rf::isa_current()); });
  m.def("force_isa", [](const std::string& name) { rf::isa_force(parse_isa(name)); });
  m.def("available_isas", [] {
    py::list names;
    for (rf::Isa isa :
         {rf::Isa::scalar, rf::Isa::avx2, rf::Isa::avx512, rf::Isa::avx512_bf16, rf::Isa::amx, rf::Isa::neon})
      if (rf::isa_available(isa)) names.append(rf::isa_name(isa));
    return names;
  });
  m.def("matmul", matmul, py::call_guard<py::gil_scoped_release>());
  // --- lerp and merge (fuse)
  m.def("lerp", lerp_in_place);
  m.def("stream", stream_merge);
  m.def("preallocate",
        [](int fd, const std::string& name, int64_t bytes) { raise_unless_ok(rf::preallocate({fd, name}, bytes)); });
  m.def("exchange_paths",
        [](const std::string& a, const std::string& b) { return rf::exchange_paths(a.c_str(), b.c_str()); });
  // --- band_topk
  py::class_<rf::BandSpec>(m, "BandSpec")
      .def(py::init(&band_spec), py::arg("d"), py::arg("k"), py::arg("skip"), py::arg("lo"), py::arg("random"),
           py::arg("seed"), py::arg("band_first"), py::arg("normalize"), py::arg("threads"), py::arg("largest") = 1);
  py::class_<rf::BandSearch>(m, "BandSearch")
      .def_static("queries_within", &rf::BandSearch::queries_within)
      .def(py::init(
          [](const rf::BandSpec& spec, int64_t first, int64_t rows, uintptr_t hi, uintptr_t offsets, uintptr_t ids) {
            return new rf::BandSearch(spec, first, rows, pointer<const double>(hi),
                                      {pointer<const int64_t>(offsets), pointer<const int64_t>(ids)});
          }))
      .def("set_queries",
           [](rf::BandSearch& self, uintptr_t queries, int dtype, int64_t row_stride) {
             rf::Status status;
             {
               py::gil_scoped_release release;
               status = self.set_queries(pointer<const void>(queries), static_cast<rf::Dtype>(dtype), row_stride);
             }
             raise_unless_ok(status);
           })
      .def(
          "push",
          [](rf::BandSearch& self, uintptr_t docs, int dtype, int64_t row_stride, int64_t count, int64_t first_id,
             uintptr_t offsets) {
            rf::Status status;
            {
              py::gil_scoped_release release;
              status = self.push(pointer<const void>(docs), static_cast<rf::Dtype>(dtype), row_stride, count, first_id,
                                 {no_signal, nullptr}, pointer<const int64_t>(offsets));
            }
            raise_unless_ok(status);
          },
          py::arg("docs"), py::arg("dtype"), py::arg("row_stride"), py::arg("count"), py::arg("first_id"),
          py::arg("offsets") = 0)
      .def("finish",
           [](rf::BandSearch& self, uintptr_t ids, uintptr_t scores, uintptr_t in_band) {
             py::gil_scoped_release release;
             self.finish(pointer<int64_t>(ids), pointer<float>(scores), pointer<int64_t>(in_band));
           })
      .def("finish_part", [](rf::BandSearch& self, uintptr_t ids, uintptr_t scores, uintptr_t drawn_ids,
                             uintptr_t drawn_scores, uintptr_t above, uintptr_t in_band) {
        py::gil_scoped_release release;
        self.finish_part({pointer<int64_t>(ids), pointer<double>(scores), pointer<int64_t>(drawn_ids),
                          pointer<double>(drawn_scores), pointer<int64_t>(above), pointer<int64_t>(in_band)});
      });
  // --- best_of_groups
  m.def("best_of_groups", best_of_groups);
  // --- info_nce
  m.def("info_nce", info_nce);
  // --- stages
  py::class_<rf::StageScope>(m, "StageScope").def(py::init(&open_stage)).def("close", &rf::StageScope::close);
  m.def("start_stages", &rf::start_stages);
  m.def("stop_stages", &stop_stages);
}
