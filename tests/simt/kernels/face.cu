// The library's face to test_simt.py.
#include "cases.h"

namespace simt_test {

std::map<std::string, Case>& cases() {
  static std::map<std::string, Case> all;
  return all;
}

}  // namespace simt_test

// Runs a case; the report of what was wrong with it, or "" when nothing was.
extern "C" __attribute__((visibility("default"))) const char* simt_run(const char* name, unsigned long long seed, float* data) {
  static std::string report;
  simt::set_seed(seed);
  try {
    simt_test::cases().at(name)(data, data);
    report.clear();
  } catch (const std::exception& error) {
    report = error.what();
  }
  return report.c_str();
}
