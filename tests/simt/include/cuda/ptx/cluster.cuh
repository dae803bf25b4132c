// Twin of csrc/cuda/ptx/cluster.cuh.
#pragma once

#include "cuda/runtime.cuh"
#include "simt/async.h"

namespace tilestream::ptx {

SIMT_TWIN unsigned cluster_ctarank() { return simt::self().cluster_rank; }
SIMT_TWIN void barrier_cluster_arrive() { simt::cluster_arrive(); }
SIMT_TWIN void barrier_cluster_wait() { simt::cluster_wait(); }
template <class T>
SIMT_TWIN T* mapa(T* p, unsigned rank) {
  return static_cast<T*>(simt::map_shared(p, rank));
}

}  // namespace tilestream::ptx
