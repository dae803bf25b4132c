// Twin of csrc/cuda/ptx/mbarrier.cuh.
#pragma once

#include "cuda/runtime.cuh"
#include "simt/async.h"

namespace tilestream::ptx {

SIMT_TWIN void mbarrier_init(uint64_t* bar, unsigned count) { simt::mbarrier_init(bar, count); }
SIMT_TWIN void fence_mbarrier_init() {}
SIMT_TWIN void fence_proxy_async() { simt::fence_proxy_async(); }
SIMT_TWIN void mbarrier_arrive(uint64_t* bar) { simt::mbarrier_arrive("mbarrier.arrive", bar, 0); }
SIMT_TWIN void mbarrier_arrive_expect_tx(uint64_t* bar, unsigned bytes) {
  simt::mbarrier_arrive("mbarrier.arrive.expect_tx", bar, bytes);
}
SIMT_TWIN void mbarrier_arrive_remote(uint64_t* bar, unsigned rank) {
  simt::mbarrier_arrive("mbarrier.arrive", static_cast<uint64_t*>(simt::map_shared(bar, rank)), 0);
}
SIMT_TWIN void cp_async_mbarrier_arrive_noinc(uint64_t* bar) { simt::cp_async_mbarrier_arrive(bar); }
SIMT_TWIN bool mbarrier_try_wait_parity(uint64_t* bar, unsigned parity) { return simt::mbarrier_try_wait(bar, parity); }
SIMT_TWIN void mbarrier_wait_parity(uint64_t* bar, unsigned parity) {
  while (!mbarrier_try_wait_parity(bar, parity)) {
  }
}
SIMT_TWIN bool mbarrier_test_wait_parity(uint64_t* bar, unsigned parity) { return simt::mbarrier_try_wait(bar, parity); }
SIMT_TWIN bool mbarrier_try_wait_parity_cluster(uint64_t* bar, unsigned parity) { return simt::mbarrier_try_wait(bar, parity); }
SIMT_TWIN void mbarrier_wait_parity_cluster(uint64_t* bar, unsigned parity) {
  while (!mbarrier_try_wait_parity_cluster(bar, parity)) {
  }
}

}  // namespace tilestream::ptx
