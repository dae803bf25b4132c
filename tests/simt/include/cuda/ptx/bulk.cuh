// Twin of csrc/cuda/ptx/bulk.cuh.
#pragma once

#include "cuda/runtime.cuh"
#include "simt/async.h"

namespace tilestream::ptx {

SIMT_TWIN void cp_async_bulk_load(void* dst, const void* src, unsigned bytes, uint64_t* bar) {
  simt::bulk_load(dst, src, bytes, bar);
}
SIMT_TWIN void cp_async_bulk_store(void* dst, const void* src, unsigned bytes) { simt::bulk_store(dst, src, bytes); }
SIMT_TWIN void cp_async_bulk_commit_group() { simt::bulk_commit_group(); }
template <int kPending>
SIMT_TWIN void cp_async_bulk_wait_group() { simt::bulk_wait_group(kPending); }
template <int kPending>
SIMT_TWIN void cp_async_bulk_wait_group_read() { simt::bulk_wait_group_read(kPending); }

}  // namespace tilestream::ptx
