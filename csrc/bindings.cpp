// The Python module tilestream._C: loading it registers the torch ops (csrc/api); what is not an op is exposed here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "api/program.h"
#include "cpu/common/cpus.h"
#include "cpu/common/rank_signals.h"
#include "cpu/common/thread_pool.h"
#include "cpu/dispatch.h"
#include "tilestream/attention_tiles.h"
#include "tilestream/linear.h"
#include "tilestream/taken_sms.h"

namespace tilestream {
void bind_planner(pybind11::module_& m);  // plan/bind_planner.cpp
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native part of tilestream.";
  m.def("simd_level", &tilestream::cpu::simd_level, "The SIMD level in use.");
  m.def("simd_levels", &tilestream::cpu::simd_levels, "SIMD levels this CPU runs, weakest first.");
  m.def("set_simd_level", &tilestream::cpu::set_simd_level, pybind11::arg("name"));
  m.def(
      "order_cpus",
      [](const std::vector<int>& allowed, const std::string& sysfs) {
        const auto order = tilestream::cpu::order_cpus(allowed, sysfs);
        return std::pair(order.cpus, order.num_cores);
      },
      pybind11::arg("allowed"), pybind11::arg("sysfs"),
      "The order in which workers are placed on the CPUs `allowed`, and how many cores these are.");
  m.def("load_simt", &tilestream::cpu::load_simt, pybind11::arg("library"),
        "Adds the emulator of tests/simt as the SIMD level simt.");
  m.attr("cuda_archs") = TILESTREAM_CUDA_ARCHS;  // "80-real ... 90-virtual"; empty: built without CUDA kernels
  m.def("num_threads", &tilestream::cpu::num_threads, "Worker threads of the CPU backend.");
  m.def(
      "set_num_threads",
      [](int num) {
        if (num < 1 || num > 256) throw std::invalid_argument("num_threads is " + std::to_string(num) + "; allowed: 1 to 256");
        tilestream::cpu::set_num_threads(num);
      },
      pybind11::arg("num"));
  m.def(
      "set_taken_sms", [](int num) { tilestream::taken_sms = num; }, pybind11::arg("num"),
      "SMs that other kernels have while this thread launches (taken_sms.h).");
  m.attr("signal_bytes") = tilestream::kSignalBytes;  // of a rank's block (allreduce.h), and what the words in it mean
  m.attr("pid_offset") = tilestream::cpu::kPidOffset;
  m.attr("fault_offset") = tilestream::cpu::kFaultOffset;
  m.def("fault_text", &tilestream::cpu::fault_text, pybind11::arg("fault"), pybind11::arg("world_size"),
        pybind11::arg("timeout_ms"));
  using tilestream::AttentionTile;
  pybind11::class_<AttentionTile>(m, "AttentionTile", "A row of the table of the Hopper attention's tiles (attention_tiles.h).")
      .def_readonly("wide_groups", &AttentionTile::wide_groups)
      .def_property_readonly("wide_rows", &AttentionTile::wide_rows)
      .def_readonly("tile_keys", &AttentionTile::tile_keys)
      .def_readonly("narrow_rows", &AttentionTile::narrow_rows);
  m.def(
      "packed_bytes",
      [](int format, int64_t n, int64_t k) { return tilestream::packed_bytes(tilestream::PackedFormat(format), n, k); },
      pybind11::arg("format"), pybind11::arg("n"), pybind11::arg("k"));
  m.def(
      "attention_tile",
      [](const std::string& kv_dtype, int head_dim_qk, int head_dim_vo) -> std::optional<AttentionTile> {
        const bool is_direct = kv_dtype == "bfloat16" || kv_dtype == "float16";
        if (!is_direct && kv_dtype != "fp8" && kv_dtype != "int8" && kv_dtype != "int4") return std::nullopt;
        const auto kind = is_direct ? tilestream::TileKind::kDirect : tilestream::TileKind::kConverted;
        const AttentionTile* const tile = tilestream::attention_tile(kind, head_dim_qk, head_dim_vo);
        return tile == nullptr ? std::nullopt : std::optional(*tile);
      },
      pybind11::arg("kv_dtype"), pybind11::arg("head_dim_qk"), pybind11::arg("head_dim_vo"),
      "The tile that the Hopper attention takes for a cache of these; None: other kernels run.");
  pybind11::class_<tilestream::Program>(m, "Program", "A recorded sequence of kernel launches, replayed without torch.")
      .def(pybind11::init<>())
      .def("begin", &tilestream::Program::begin, "Keep every op that this thread calls from now on.")
      .def("end", &tilestream::Program::end)
      .def("run", &tilestream::Program::run, pybind11::call_guard<pybind11::gil_scoped_release>(),
           "The recorded launches again, on the same buffers.")
      .def_property_readonly("num_launches", &tilestream::Program::num_launches);
  tilestream::bind_planner(m);
}
