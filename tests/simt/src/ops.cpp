// The library's face to tilestream._C: every CUDA op by name, run on the emulator.
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/ops.h"
#include "simt/launch.h"
#include "simt/ranks.h"

using namespace tilestream;

namespace {

// As csrc/api/launch.h does for a GPU: the op, with the workspace that it asks for.
template <class Params>
void run(void (*op)(const Params&, Stream), Params params) {
  std::unique_ptr<unsigned char[]> workspace;
  if constexpr (requires { cuda::workspace_bytes(params); }) {
    const auto num_bytes = size_t(cuda::workspace_bytes(params));
    workspace = std::make_unique_for_overwrite<unsigned char[]>(num_bytes);  // aligned to 16 bytes
    std::memset(workspace.get(), 0xff, num_bytes);                           // NaN
    params.workspace = workspace.get();
  }
  op(params, nullptr);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// void(const Params&) of the op, or null if it has no CUDA kernel.
EXPORT void* tilestream_simt_op(const char* name) {
#define ENTRY(op, Params) \
  if (std::strcmp(name, #op) == 0) return reinterpret_cast<void*>(+[](const Params& p) { run(cuda::op, p); });
  TILESTREAM_CUDA_OPS(ENTRY)
  return nullptr;
}

EXPORT void tilestream_simt_set_seed(unsigned long long seed) { simt::set_seed(seed); }
EXPORT void tilestream_simt_set_arch(int arch) { simt::set_arch(arch); }

struct Call {
  const char* op;
  const void* params;
};

// Each rank's stream of calls, all ranks at once: those of rank r are calls[r * num_calls ...]. The report of what was wrong, or
// "".
EXPORT const char* tilestream_simt_run_ranks(const Call* calls, int num_ranks, int num_calls) {
  static std::string report;
  report.clear();
  try {
    simt::run_ranks(num_ranks, [&](int rank) {
      for (int i = rank * num_calls; i < (rank + 1) * num_calls; ++i)
        reinterpret_cast<void (*)(const void*)>(tilestream_simt_op(calls[i].op))(calls[i].params);
    });
  } catch (const std::exception& error) {
    report = error.what();
  }
  return report.c_str();
}

EXPORT void* tilestream_simt_make_multicast(void* const* peers, int num, size_t bytes) {
  return simt::make_multicast({peers, peers + num}, bytes);
}
EXPORT void tilestream_simt_free_multicast(void* address) { simt::free_multicast(address); }
