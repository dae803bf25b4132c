#include "global_shadow.h"

#include "machine.h"

namespace simt {

size_t GlobalShadow::index_of(const Thread& thread) const {
  return std::max(Machine::of_this_thread().rank, 0) * per_rank_ + thread.owner->cluster->index;
}

void GlobalShadow::begin_launch(int rank) {
  const std::lock_guard lock(mutex_);
  const size_t first = rank * per_rank_;
  Clock before(clocks_.size(), 0);
  for (size_t i = first; i < first + per_rank_; ++i) join(before, clocks_[i].now);
  for (size_t i = first; i < first + per_rank_; ++i) clocks_[i] = {before, before, {}}, ++clocks_[i].now[i];
}

void GlobalShadow::access(const Thread& thread, Shadow::Kind kind, const char* what, const void* address, size_t bytes,
                          const void* pc) {
  std::unique_lock lock(mutex_);
  const uint32_t cluster = uint32_t(index_of(thread));
  const Clock& now = clocks_[cluster].now;
  const Access me{cluster, now[cluster], pc, kind == Shadow::kAtomic, thread.Position::block};
  const auto ordered = [&](const Access& before) {
    return before.now == 0 || before.cluster == cluster || (me.atomic && before.atomic) || now[before.cluster] >= before.now;
  };
  const auto refuse = [&](Access before, const char* verb) {  // by value: the report never comes back, and others go on
    lock.unlock();
    report(thread, kind, what, before, verb, address, pc);
  };
  const auto begin = reinterpret_cast<uintptr_t>(address);
  for (uintptr_t at = begin; at < begin + bytes; ++at) {
    auto& page = pages_[at / kPage];
    if (page == nullptr) page = std::make_unique<Cell[]>(kPage);
    Cell& cell = page[at % kPage];
    if (!ordered(cell.write)) refuse(cell.write, "written");
    if (kind == Shadow::kRead) {
      if (cell.reads[0].now != 0 && cell.reads[0].cluster != cluster) cell.reads[1] = cell.reads[0];
      cell.reads[0] = me;
      continue;
    }
    for (const Access& before : cell.reads) {
      if (!ordered(before)) refuse(before, "read");
    }
    cell.write = me;
    cell.reads[0] = cell.reads[1] = Access{};
  }
}

void GlobalShadow::fence(const Thread& thread) {
  const std::lock_guard lock(mutex_);
  Clocks& clocks = clocks_of(thread);
  join(clocks.now, clocks.seen_relaxed);
  clocks.seen_relaxed.clear();
  clocks.fenced = clocks.now;
  ++clocks.now[index_of(thread)];
}

void GlobalShadow::relaxed(const Thread& thread, const void* address) {
  const std::lock_guard lock(mutex_);
  Clocks& clocks = clocks_of(thread);
  Clock& word = released_[address];
  join(clocks.seen_relaxed, word);
  join(word, clocks.fenced);
}

void GlobalShadow::acquire(const Thread& thread, const void* address) {
  const std::lock_guard lock(mutex_);
  const auto found = released_.find(address);
  if (found != released_.end()) join(clocks_of(thread).now, found->second);
}

void GlobalShadow::release(const Thread& thread, const void* address) {
  const std::lock_guard lock(mutex_);
  Clocks& clocks = clocks_of(thread);
  join(released_[address], clocks.now);
  ++clocks.now[index_of(thread)];
}

void GlobalShadow::report(const Thread& thread, Shadow::Kind kind, const char* what, const Access& before, const char* verb,
                          const void* address, const void* pc) const {
  const std::string of_rank =
      Machine::of_this_thread().rank < 0 ? " at " : format(" of rank %zu at ", before.cluster / per_rank_);
  static const char* const kVerbs[] = {"reads", "writes", "changes atomically"};
  const std::string text =
      format("race in global memory: %s (%s) %s %p, %s by block (%u,%u,%u)%s, with no release and acquire between",
             describe(thread).c_str(), what, kVerbs[kind], address, before.atomic ? "changed atomically" : verb, before.block.x,
             before.block.y, before.block.z, (of_rank + where(before.pc)).c_str());
  Machine::of_this_thread().fail_current(text, pc);
}

}  // namespace simt
