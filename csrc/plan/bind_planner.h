#pragma once

#include <pybind11/pybind11.h>

namespace tilestream {

// Adds the class Planner to the module.
void bind_planner(pybind11::module_& m);

}  // namespace tilestream
