// Twin of csrc/cuda/ptx/memory.cuh. Acquiring loads let other threads run: loops around them end when the others wrote.
#pragma once

#include "cuda/runtime.cuh"

namespace simt {

SIMT_TWIN unsigned load_acquire(const char* what, const unsigned* p) {
  poll(what);
  const unsigned v = __atomic_load_n(p, __ATOMIC_ACQUIRE);
  acquire(p);
  return v;
}
SIMT_TWIN void store_release(unsigned* p, unsigned v) {
  preempt();
  release(p);
  __atomic_store_n(p, v, __ATOMIC_RELEASE);
}
SIMT_TWIN unsigned add(unsigned* p, unsigned v) {
  preempt();
  acquire(p), release(p);
  return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL);
}
SIMT_TWIN unsigned compare_and_swap(unsigned* p, unsigned compare, unsigned v) {
  preempt();
  acquire(p), release(p);
  __atomic_compare_exchange_n(p, &compare, v, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  return compare;
}

}  // namespace simt

namespace tilestream::ptx {

SIMT_TWIN unsigned ld_acquire_gpu(const unsigned* p) { return simt::load_acquire("ld.acquire.gpu", p); }
SIMT_TWIN unsigned ld_acquire_sys(const unsigned* p) { return simt::load_acquire("ld.acquire.sys", p); }
SIMT_TWIN unsigned ld_relaxed_sys(const unsigned* p) {
  simt::preempt();
  return __atomic_load_n(p, __ATOMIC_RELAXED);
}
SIMT_TWIN void st_release_gpu(unsigned* p, unsigned v) { simt::store_release(p, v); }
SIMT_TWIN void st_release_sys(unsigned* p, unsigned v) { simt::store_release(p, v); }
SIMT_TWIN unsigned atom_add_acq_rel_gpu(unsigned* p, unsigned v) { return simt::add(p, v); }
SIMT_TWIN unsigned atom_add_acq_rel_sys(unsigned* p, unsigned v) { return simt::add(p, v); }
SIMT_TWIN unsigned atom_cas_acq_rel_gpu(unsigned* p, unsigned compare, unsigned v) {
  return simt::compare_and_swap(p, compare, v);
}
SIMT_TWIN unsigned atom_cas_acq_rel_sys(unsigned* p, unsigned compare, unsigned v) {
  return simt::compare_and_swap(p, compare, v);
}
SIMT_TWIN void red_add_release_gpu(unsigned* p, unsigned v) { simt::add(p, v); }
SIMT_TWIN void red_add_release_sys(unsigned* p, unsigned v) { simt::add(p, v); }
SIMT_TWIN void fence_acq_rel_gpu() { simt::preempt(), __threadfence(); }
SIMT_TWIN void fence_acq_rel_sys() { simt::preempt(), __threadfence_system(); }
SIMT_TWIN void fence_proxy_alias() { simt::preempt(); }
SIMT_TWIN uint4 ld_nc_no_allocate(const uint4* p) { return *p; }
SIMT_TWIN void prefetch_l2(const void*) {}

}  // namespace tilestream::ptx
