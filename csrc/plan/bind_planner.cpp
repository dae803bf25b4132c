// Python's view of the planner: tilestream._C.Planner. No torch: numpy arrays in, a numpy view of the plan out.
#include "bind_planner.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "tilestream/plan.h"

namespace py = pybind11;

namespace tilestream {
namespace {

using Int32Array = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using Groups = std::vector<std::pair<int32_t, std::vector<int32_t>>>;

// An int32 array of `lengths`: as it is, or a copy if it holds other integers that fit (a Python list, say).
Int32Array int32_array(const py::object& lengths, const char* name) {
  py::array array = py::array::ensure(lengths);
  if (!array) throw py::type_error(std::string(name) + " must be an integer array on the CPU");
  if (py::isinstance<py::array_t<int32_t>>(array) || array.size() == 0) return Int32Array(array);
  const char kind = array.dtype().kind();
  if (kind != 'i' && kind != 'u') {
    throw py::type_error(std::string(name) + " must hold integers, got " + py::str(array.dtype()).cast<std::string>());
  }
  const py::array_t<int64_t, py::array::c_style | py::array::forcecast> wide(array);
  for (py::ssize_t i = 0; i < wide.size(); ++i) {
    if (wide.data()[i] != int32_t(wide.data()[i])) {
      plan::reject(name, " holds ", wide.data()[i], ", which does not fit int32");
    }
  }
  return Int32Array(array);
}

class PyPlanner {
 public:
  explicit PyPlanner(const PlanConfig& config) : planner_(config) {}

  py::array_t<int32_t> plan(const py::object& cu_seqlens_q, const py::object& kv_lens, const Groups& groups) {
    const auto [num_int32, num_rows] = measure(cu_seqlens_q, kv_lens, groups);
    // A larger plan gets a new buffer; views of the old one keep that alive.
    if (buffer_.size() < num_int32) buffer_ = py::array_t<int32_t>(num_int32 + num_int32 / 2);
    const int64_t total_int32 = planner_.write(buffer_.mutable_data());
    return py::array_t<int32_t>({py::ssize_t(total_int32)}, {py::ssize_t(sizeof(int32_t))}, buffer_.data(), buffer_);
  }

  // At most how many int32 the plan takes, and how many partial rows it has.
  std::pair<int64_t, int64_t> measure(const py::object& cu_seqlens_q, const py::object& kv_lens, const Groups& groups) {
    cu_seqlens_ = int32_array(cu_seqlens_q, "cu_seqlens_q");
    lens_ = int32_array(kv_lens, "kv_lens");
    check_shapes(cu_seqlens_, lens_);
    group_indptr_.assign(1, 0);
    group_requests_.clear();
    group_prefix_tokens_.clear();
    for (const auto& [prefix_tokens, requests] : groups) {
      group_prefix_tokens_.push_back(prefix_tokens);
      group_requests_.insert(group_requests_.end(), requests.begin(), requests.end());
      group_indptr_.push_back(int32_t(group_requests_.size()));
    }
    PlanInput input{};
    input.batch_size = int32_t(cu_seqlens_.size()) - 1;
    input.cu_seqlens_q = cu_seqlens_.data();
    input.kv_lens = lens_.data();
    input.lists_per_head = lens_.ndim() == 2;
    input.num_groups = int32_t(groups.size());
    input.group_indptr = group_indptr_.data();
    input.group_requests = group_requests_.data();
    input.group_prefix_tokens = group_prefix_tokens_.data();

    const int64_t num_int32 = planner_.prepare(input);
    return {num_int32, planner_.max_partial_rows()};
  }

 private:
  void check_shapes(const Int32Array& cu_seqlens, const Int32Array& lens) const {
    if (cu_seqlens.ndim() != 1 || cu_seqlens.size() < 1) {
      plan::reject("cu_seqlens_q must have shape [batch_size + 1], got ", cu_seqlens.ndim(), " dimensions and ",
                   cu_seqlens.size(), " values");
    }
    const int32_t num_kv_heads = planner_.config().num_kv_heads;
    const bool right_rank = lens.ndim() == 1 || lens.ndim() == 2;
    if (!right_rank || lens.shape(0) != cu_seqlens.size() - 1 || (lens.ndim() == 2 && lens.shape(1) != num_kv_heads)) {
      plan::reject("kv_lens must have shape [", cu_seqlens.size() - 1, "] or [", cu_seqlens.size() - 1, ", ",
                   num_kv_heads, "] (batch_size = cu_seqlens_q's length - 1, num_kv_heads), got ",
                   py::str(py::tuple(py::array(lens).attr("shape"))).cast<std::string>());
    }
  }

  Planner planner_;
  py::array_t<int32_t> buffer_;
  Int32Array cu_seqlens_, lens_;  // of the step measured last: write() reads them
  std::vector<int32_t> group_indptr_, group_requests_, group_prefix_tokens_;
};

constexpr const char* kPlanDoc = R"(Plan one step.

Args:
    cu_seqlens_q: [batch_size + 1] integers on the CPU; prefix sum of the requests' query tokens, from 0.
    kv_lens: [batch_size], or [batch_size, num_kv_heads] for a page list per kv head; tokens in each list, the
        step's own included.
    groups: (prefix_tokens, [request indices]) of the requests that share their first prefix_tokens KV tokens.
Returns:
    int32 array, laid out as in plan.h; overwritten by the next call on this planner.
Raises:
    ValueError, TypeError: which argument, what it was, what is allowed.
)";

}  // namespace

void bind_planner(py::module_& m) {
  py::class_<PyPlanner>(m, "Planner", "Cuts a step's attention work into jobs and deals them to workers (plan.h).")
      .def(py::init([](int32_t num_qo_heads, int32_t num_kv_heads, int32_t page_size, int32_t num_workers,
                       int32_t tile_rows, int32_t tile_keys, int32_t split_tokens, int32_t window_left, bool causal,
                       bool batch_invariant, int32_t cost_tile, int32_t cost_row, int32_t narrow_rows,
                       bool merge_inside) {
             const PlanMode mode = batch_invariant ? PlanMode::kBatchInvariant : PlanMode::kBalanced;
             return std::make_unique<PyPlanner>(PlanConfig{num_qo_heads, num_kv_heads, page_size, num_workers,
                                                           tile_rows, tile_keys, split_tokens, window_left, causal,
                                                           mode, cost_tile, cost_row, narrow_rows, merge_inside});
           }),
           py::kw_only(), py::arg("num_qo_heads"), py::arg("num_kv_heads"), py::arg("page_size"),
           py::arg("num_workers"), py::arg("tile_rows"), py::arg("tile_keys"), py::arg("split_tokens"),
           py::arg("window_left"), py::arg("causal"), py::arg("batch_invariant"), py::arg("cost_tile"),
           py::arg("cost_row"), py::arg("narrow_rows") = 0, py::arg("merge_inside") = false)
      .def("measure", &PyPlanner::measure, "At most how many int32 the plan of a step takes, and how many partial rows it has.",
           py::arg("cu_seqlens_q"), py::arg("kv_lens"), py::arg("groups") = Groups{})
      .def("plan", &PyPlanner::plan, kPlanDoc, py::arg("cu_seqlens_q"), py::arg("kv_lens"),
           py::arg("groups") = Groups{});
}

}  // namespace tilestream
