#include "cpu/common/cpus.h"

#include <sched.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <numeric>
#include <thread>
#include <tuple>

namespace tilestream::cpu {
namespace {

namespace fs = std::filesystem;

// "0-2,8" -> 0 1 2 8; nothing where the file cannot be read.
std::vector<int> read_list(const fs::path& file) {
  std::vector<int> found;
  std::ifstream in(file);
  for (int first; in >> first;) {
    int last = first;
    if (in.peek() == '-') in.ignore() >> last;
    for (int cpu = first; cpu <= last; ++cpu) found.push_back(cpu);
    if (in.peek() == ',') in.ignore();
  }
  return found;
}

std::map<int, int> nodes_of_cpus(const fs::path& sysfs) {
  std::map<int, int> node_of;
  std::error_code no_such_directory;
  for (const auto& entry : fs::directory_iterator(sysfs / "node", no_such_directory)) {
    int node = 0;
    if (std::sscanf(entry.path().filename().c_str(), "node%d", &node) != 1) continue;
    for (int cpu : read_list(entry.path() / "cpulist")) node_of[cpu] = node;
  }
  return node_of;
}

std::vector<int> allowed_cpus() {
  std::vector<int> allowed;
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (CPU_ISSET(cpu, &set)) allowed.push_back(cpu);
    }
  }
  if (allowed.empty()) {
    allowed.resize(std::max(1u, std::thread::hardware_concurrency()));
    std::iota(allowed.begin(), allowed.end(), 0);
  }
  return allowed;
}

}  // namespace

CpuOrder order_cpus(const std::vector<int>& allowed, const std::string& sysfs) {
  std::map<int, int> node_of = nodes_of_cpus(sysfs);
  std::vector<std::tuple<int, int, int>> places;  // (hardware threads of the same core before this one, node, cpu)
  for (int cpu : allowed) {
    const std::string core = sysfs + "/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list";
    int num_before = 0;
    for (int sibling : read_list(core)) {
      num_before += sibling < cpu && std::binary_search(allowed.begin(), allowed.end(), sibling);
    }
    places.emplace_back(num_before, node_of[cpu], cpu);
  }
  std::sort(places.begin(), places.end());
  CpuOrder order{{}, 0};
  for (const auto& [num_before, node, cpu] : places) {
    order.cpus.push_back(cpu);
    order.num_cores += num_before == 0;
  }
  return order;
}

const CpuOrder& usable_cpus() {
  static const CpuOrder order = order_cpus(allowed_cpus(), "/sys/devices/system");
  return order;
}

}  // namespace tilestream::cpu
