// The CPUs this process may use, and in which order workers are placed on them.
#pragma once

#include <string>
#include <vector>

namespace tilestream::cpu {

// `cpus`: one hardware thread of every core, node by node; then the cores' second threads, node by node; and so on.
// Shares of work are contiguous in the worker's number, so each NUMA node works on one stretch of a matrix.
struct CpuOrder {
  std::vector<int> cpus;
  int num_cores;
};

// The order of `allowed` (ascending), as the directory tree at `sysfs` describes the machine; what it does not describe
// counts as a core of its own on node 0.
CpuOrder order_cpus(const std::vector<int>& allowed, const std::string& sysfs);

// The CPUs that this process may use, as they are at the first call.
const CpuOrder& usable_cpus();

}  // namespace tilestream::cpu
