// Several ranks at once, and the multicast addresses that stand for the same place in all of them.
#include "simt/ranks.h"

#include <sys/mman.h>

#include <mutex>
#include <stdexcept>
#include <thread>

#include "machine.h"

namespace simt {
namespace {

struct Multicast {
  std::vector<void*> peers;
  size_t bytes;
};
std::mutex multicasts_mutex;
std::map<const char*, Multicast> multicasts;  // by address

}  // namespace

void run_ranks(int num_ranks, const std::function<void(int rank)>& body) {
  RankGroup group(num_ranks);
  std::vector<std::string> reports(num_ranks);
  const auto run = [&](int rank) {
    Machine& machine = Machine::of_this_thread();
    machine.ranks = &group, machine.rank = rank;
    try {
      body(rank);
    } catch (const Stopped&) {
    } catch (const std::exception& error) {
      reports[rank] = error.what();
      if (!group.deadlocked) group.failed = true;
    }
    group.idle_at[rank] = RankGroup::kEnded;
    ++group.progress;
  };
  std::vector<std::thread> threads;
  for (int rank = 0; rank < num_ranks; ++rank) threads.emplace_back(run, rank);
  for (std::thread& thread : threads) thread.join();
  std::string all;
  for (const std::string& report : reports) {
    if (!report.empty()) all += (all.empty() ? "" : "\n") + report;
  }
  if (!all.empty()) throw std::runtime_error(all);
}

void* make_multicast(const std::vector<void*>& peers, size_t bytes) {
  void* address = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (address == MAP_FAILED) throw std::bad_alloc();
  const std::lock_guard lock(multicasts_mutex);
  multicasts[static_cast<char*>(address)] = {peers, bytes};
  return address;
}

void free_multicast(void* address) {
  const std::lock_guard lock(multicasts_mutex);
  const auto found = multicasts.find(static_cast<char*>(address));
  munmap(address, found->second.bytes);
  multicasts.erase(found);
}

std::vector<void*> peers(const char* what, const void* address, size_t bytes) {
  const auto* p = static_cast<const char*>(address);
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail("%s at %p, which is not a multiple of %zu", what, address, bytes);
  std::unique_lock lock(multicasts_mutex);
  auto found = multicasts.upper_bound(p);
  if (found == multicasts.begin() || (--found, p + bytes > found->first + found->second.bytes)) {
    // fail() leaves this stack for good: no destructor runs
    lock.unlock();
    fail("%s at %p, which is no multicast address", what, address);
  }
  std::vector<void*> places;
  for (void* peer : found->second.peers) places.push_back(static_cast<char*>(peer) + (p - found->first));
  return places;
}

}  // namespace simt
