// The Python module tilestream._C: loading it registers the torch ops (csrc/api); what is not an op is exposed here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "api/program.h"
#include "cpu/common/cpus.h"
#include "cpu/common/thread_pool.h"
#include "cpu/dispatch.h"

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
  m.def("load_simt", &tilestream::cpu::load_simt, pybind11::arg("library"), "Adds the emulator of tests/simt as the SIMD level simt.");
  m.attr("cuda_archs") = TILESTREAM_CUDA_ARCHS;  // "80-real ... 90-virtual"; empty: built without CUDA kernels
  m.def("num_threads", &tilestream::cpu::num_threads, "Worker threads of the CPU backend.");
  m.def(
      "set_num_threads",
      [](int num) {
        if (num < 1 || num > 256) throw std::invalid_argument("num_threads is " + std::to_string(num) + "; allowed: 1 to 256");
        tilestream::cpu::set_num_threads(num);
      },
      pybind11::arg("num"));
  pybind11::class_<tilestream::Program>(m, "Program", "A recorded sequence of kernel launches, replayed without torch.")
      .def(pybind11::init<>())
      .def("begin", &tilestream::Program::begin, "Keep every op that this thread calls from now on.")
      .def("end", &tilestream::Program::end)
      .def("run", &tilestream::Program::run, pybind11::call_guard<pybind11::gil_scoped_release>(),
           "The recorded launches again, on the same buffers.")
      .def_property_readonly("num_launches", &tilestream::Program::num_launches);
  tilestream::bind_planner(m);
}
