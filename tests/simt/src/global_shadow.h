// Races in global memory between clusters of one launch, or of the launches of several ranks: who last wrote and read each
// byte, and what orders whom.
//
// As shadow.h, with clusters for threads: what one of them released, by any of its threads, is ordered before what follows in
// the one that acquired it. A rank's launch is ordered behind its launches before. Costs several times a launch's own time, so
// it is on only with TILESTREAM_SIMT_GLOBAL_RACES=1.
#pragma once

#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "clock.h"
#include "shadow.h"
#include "simt/vector_types.h"

namespace simt {

class GlobalShadow {
 public:
  // of each launch at most `num_clusters` clusters
  explicit GlobalShadow(size_t num_clusters, int num_ranks = 1) : clocks_(num_ranks * num_clusters), per_rank_(num_clusters) {}

  void begin_launch(int rank);
  void access(const Thread& thread, Shadow::Kind kind, const char* what, const void* address, size_t bytes, const void* pc);
  // A fence: earlier accesses may be published by relaxed atomics from now on, and what those read so far is ordered before.
  void fence(const Thread& thread);
  void relaxed(const Thread& thread, const void* address);  // an atomic on a word, with no order of its own
  void acquire(const Thread& thread, const void* address);
  void release(const Thread& thread, const void* address);

 private:
  struct Access {
    uint32_t cluster, now;  // now 0: none
    const void* pc;
    bool atomic;
    uint3 block;
  };
  struct Cell {
    Access write{}, reads[2]{};
  };
  struct Clocks {
    Clock now, fenced, seen_relaxed;  // its own; at its last fence; of the relaxed values that it read since
  };
  size_t index_of(const Thread& thread) const;
  Clocks& clocks_of(const Thread& thread) { return clocks_[index_of(thread)]; }
  [[noreturn]] void report(const Thread& thread, Shadow::Kind kind, const char* what, const Access& before, const char* verb,
                           const void* address, const void* pc) const;

  static constexpr size_t kPage = 4096;
  std::unordered_map<uintptr_t, std::unique_ptr<Cell[]>> pages_;
  std::unordered_map<const void*, Clock> released_;  // by the word that was written
  std::vector<Clocks> clocks_;  // of the clusters, rank by rank
  size_t per_rank_;
  std::mutex mutex_;            // ranks are host threads
};

}  // namespace simt
