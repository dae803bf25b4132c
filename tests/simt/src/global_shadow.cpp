#include "global_shadow.h"

#include "machine.h"

namespace simt {

GlobalShadow::Clocks& GlobalShadow::clocks_of(const Thread& thread) {
  Clocks& clocks = clocks_[thread.owner->cluster->index];
  if (clocks.now.empty()) clocks.now.resize(clocks_.size(), 0), clocks.now[thread.owner->cluster->index] = 1;
  return clocks;
}

void GlobalShadow::access(const Thread& thread, Shadow::Kind kind, const char* what, const void* address, size_t bytes,
                          const void* pc) {
  const uint32_t cluster = uint32_t(thread.owner->cluster->index);
  const Clock& now = clocks_of(thread).now;
  const Access me{cluster, now[cluster], pc, kind == Shadow::kAtomic, thread.Position::block};
  const auto ordered = [&](const Access& before) {
    return before.now == 0 || before.cluster == cluster || (me.atomic && before.atomic) || now[before.cluster] >= before.now;
  };
  const auto begin = reinterpret_cast<uintptr_t>(address);
  for (uintptr_t at = begin; at < begin + bytes; ++at) {
    auto& page = pages_[at / kPage];
    if (page == nullptr) page = std::make_unique<Cell[]>(kPage);
    Cell& cell = page[at % kPage];
    if (!ordered(cell.write)) report(thread, kind, what, cell.write, "written", address, pc);
    if (kind == Shadow::kRead) {
      if (cell.reads[0].now != 0 && cell.reads[0].cluster != cluster) cell.reads[1] = cell.reads[0];
      cell.reads[0] = me;
      continue;
    }
    for (const Access& before : cell.reads) {
      if (!ordered(before)) report(thread, kind, what, before, "read", address, pc);
    }
    cell.write = me;
    cell.reads[0] = cell.reads[1] = Access{};
  }
}

void GlobalShadow::fence(const Thread& thread) {
  Clocks& clocks = clocks_of(thread);
  join(clocks.now, clocks.seen_relaxed);
  clocks.seen_relaxed.clear();
  clocks.fenced = clocks.now;
  ++clocks.now[thread.owner->cluster->index];
}

void GlobalShadow::relaxed(const Thread& thread, const void* address) {
  Clocks& clocks = clocks_of(thread);
  Clock& word = released_[address];
  join(clocks.seen_relaxed, word);
  join(word, clocks.fenced);
}

void GlobalShadow::acquire(const Thread& thread, const void* address) {
  const auto found = released_.find(address);
  if (found != released_.end()) join(clocks_of(thread).now, found->second);
}

void GlobalShadow::release(const Thread& thread, const void* address) {
  Clocks& clocks = clocks_of(thread);
  join(released_[address], clocks.now);
  ++clocks.now[thread.owner->cluster->index];
}

void GlobalShadow::report(const Thread& thread, Shadow::Kind kind, const char* what, const Access& before, const char* verb,
                          const void* address, const void* pc) const {
  static const char* const kVerbs[] = {"reads", "writes", "changes atomically"};
  const std::string text =
      format("race in global memory: %s (%s) %s %p, %s by block (%u,%u,%u) at %s, with no release and acquire between",
             describe(thread).c_str(), what, kVerbs[kind], address, before.atomic ? "changed atomically" : verb, before.block.x,
             before.block.y, before.block.z, where(before.pc).c_str());
  Machine::of_this_thread().fail_current(text, pc);
}

}  // namespace simt
