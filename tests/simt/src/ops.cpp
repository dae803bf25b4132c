// The library's face to tilestream._C: every CUDA op by name, run on the emulator.
#include <cstring>
#include <memory>

#include "cuda/ops.h"
#include "simt/launch.h"

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

// void(const Params&) of the op, or null if it has no CUDA kernel.
extern "C" __attribute__((visibility("default"))) void* tilestream_simt_op(const char* name) {
#define ENTRY(op, Params) \
  if (std::strcmp(name, #op) == 0) return reinterpret_cast<void*>(+[](const Params& p) { run(cuda::op, p); });
  TILESTREAM_CUDA_OPS(ENTRY)
  return nullptr;
}

extern "C" __attribute__((visibility("default"))) void tilestream_simt_set_seed(unsigned long long seed) { simt::set_seed(seed); }
extern "C" __attribute__((visibility("default"))) void tilestream_simt_set_arch(int arch) { simt::set_arch(arch); }
