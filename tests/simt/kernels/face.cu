// The library's face to test_simt.py and test_ranks.py.
#include "cases.h"
#include "simt/ranks.h"

namespace simt_test {

std::map<std::string, Case>& cases() {
  static std::map<std::string, Case> all;
  return all;
}
std::map<std::string, RankCase>& rank_cases() {
  static std::map<std::string, RankCase> all;
  return all;
}

namespace {

// The report of what was wrong, or "" when nothing was.
template <class F>
const char* report_of(unsigned long long seed, F run) {
  static std::string report;
  simt::set_seed(seed);
  try {
    run();
    report.clear();
  } catch (const std::exception& error) {
    report = error.what();
  }
  return report.c_str();
}

}  // namespace
}  // namespace simt_test

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* simt_run(const char* name, unsigned long long seed, float* data) {
  return simt_test::report_of(seed, [&] { simt_test::cases().at(name)(data, data); });
}

// Rank r's buffer is the 1,024 floats from data + 1024 r on.
EXPORT const char* simt_run_ranks(const char* name, unsigned long long seed, float* data, int num_ranks) {
  std::vector<float*> buffers;
  for (int rank = 0; rank < num_ranks; ++rank) buffers.push_back(data + 1024 * rank);
  void* multicast = simt::make_multicast({buffers.begin(), buffers.end()}, 4096);
  const char* report = simt_test::report_of(seed, [&] {
    simt::run_ranks(num_ranks, [&](int rank) {
      simt_test::rank_cases().at(name)({buffers.data(), static_cast<float*>(multicast), rank, num_ranks});
    });
  });
  simt::free_multicast(multicast);
  return report;
}
