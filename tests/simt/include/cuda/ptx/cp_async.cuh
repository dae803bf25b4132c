// Twin of csrc/cuda/ptx/cp_async.cuh.
#pragma once

#include "cuda/runtime.cuh"
#include "simt/async.h"

namespace tilestream::ptx {

template <int kBytes>
SIMT_TWIN void cp_async(void* dst, const void* src, int src_bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  simt::cp_async(dst, src, kBytes, src_bytes);
}
SIMT_TWIN void cp_async_commit_group() { simt::cp_async_commit_group(); }
template <int kPending>
SIMT_TWIN void cp_async_wait_group() { simt::cp_async_wait_group(kPending); }
SIMT_TWIN void cp_async_wait_all() {
  simt::cp_async_commit_group();
  simt::cp_async_wait_group(0);
}

}  // namespace tilestream::ptx
