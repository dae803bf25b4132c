// The library's face to tilestream._C: every CUDA op by name, run on the emulator.
#include <cstring>

#include "cuda/ops.h"
#include "simt/launch.h"

using namespace tilestream;

// void(const Params&) of the op, or null if it has no CUDA kernel.
extern "C" __attribute__((visibility("default"))) void* tilestream_simt_op(const char* name) {
#define ENTRY(op, Params) \
  if (std::strcmp(name, #op) == 0) return reinterpret_cast<void*>(+[](const Params& p) { cuda::op(p, nullptr); });
  TILESTREAM_CUDA_OPS(ENTRY)
  return nullptr;
}

extern "C" __attribute__((visibility("default"))) void tilestream_simt_set_seed(unsigned long long seed) { simt::set_seed(seed); }
