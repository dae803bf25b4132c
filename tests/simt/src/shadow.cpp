#include "shadow.h"

#include "machine.h"

namespace simt {
namespace {

const char kCodeAnchor = 0;  // accesses keep 32-bit distances from here; one library is smaller than that

int32_t pack_pc(const void* pc) { return int32_t(static_cast<const char*>(pc) - &kCodeAnchor); }
const void* unpack_pc(int32_t pc) { return &kCodeAnchor + pc; }

constexpr uint32_t kLastMoment = (1u << 17) - 1;

}  // namespace

bool Shadow::ordered(const Thread& thread, const Access& before) const {
  if (before.now == 0) return true;
  if (int(before.tid) == thread.tid) return true;
  return (*thread.seen)[before.tid] >= before.now;
}

void Shadow::access(const Thread& thread, Kind kind, const char* what, size_t offset, size_t bytes, const void* pc) {
  if (thread.now > kLastMoment)
    Machine::of_this_thread().fail_current("more than 2^17 synchronisations in one thread: use a smaller shape", pc);
  const Access me{uint32_t(thread.tid), kind == kAtomic, thread.now, pack_pc(pc)};
  check_and_record(thread, kind, what, offset, bytes, me, false, pc);
}

void Shadow::access_async(const Thread& issuer, Kind kind, const char* what, size_t offset, size_t bytes, int agent,
                          uint32_t epoch, bool proxy, const void* pc) {
  const Access me{uint32_t(agent), kind == kAtomic, epoch, pack_pc(pc)};
  check_and_record(issuer, kind, what, offset, bytes, me, proxy, pc);
}

void Shadow::check_and_record(const Thread& thread, Kind kind, const char* what, size_t offset, size_t bytes, Access me,
                              bool proxy, const void* pc) {
  for (size_t i = offset; i < offset + bytes; ++i) {
    Cell& cell = cells_[i];
    const bool same_op = cell.write.tid == me.tid && cell.write.now == me.now;
    if (!same_op && !(kind == kAtomic && cell.write.atomic) && !ordered(thread, cell.write))
      report(thread, what, kind, i, cell.write, cell.write.atomic ? "changed atomically" : "written", pc);
    if (proxy && kind == kRead && int(cell.write.tid) < num_threads_ && cell.write.now != 0) {
      const Thread& writer = *thread.owner->cluster->threads[cell.write.tid];
      if (writer.proxy_fence < cell.write.now)
        Machine::of_this_thread().fail_current(
            format("missing fence.proxy.async: %s of %s reads shared memory byte 0x%zx through the async proxy, written by %s "
                   "at %s with no fence.proxy.async by the writer since",
                   what, describe(thread).c_str(), i, describe(writer).c_str(), where(unpack_pc(cell.write.pc)).c_str()), pc);
    }
    if (kind == kRead) {
      if (cell.reads[0].tid != me.tid || cell.reads[0].now == 0) cell.reads[1] = cell.reads[0];
      cell.reads[0] = me;
    } else {
      for (const Access& before : cell.reads) {
        if (!ordered(thread, before)) report(thread, what, kind, i, before, "read", pc);
      }
      cell.write = me;
      cell.reads[0] = cell.reads[1] = Access{};
    }
  }
}

void Shadow::report(const Thread& thread, const char* what, Kind kind, size_t offset, const Access& before,
                    const char* before_kind, const void* pc) const {
  static const char* const kVerbs[] = {"reads", "writes", "changes atomically"};
  const bool async = int(before.tid) >= num_threads_;
  const Thread& other = *thread.owner->cluster->threads[async ? before.tid % num_threads_ : before.tid];
  const std::string at = where(unpack_pc(before.pc));
  const std::string by = async ? format("an asynchronous operation that %s issued at %s and nobody has waited for",
                                        describe(other).c_str(), at.c_str())
                               : format("%s at %s, with no barrier between", describe(other).c_str(), at.c_str());
  const std::string text =
      format("race in shared memory: %s (%s) %s byte 0x%zx of shared memory of block %zu in its cluster, %s by %s",
             describe(thread).c_str(), what, kVerbs[kind], offset % stride_, offset / stride_, before_kind, by.c_str());
  Machine::of_this_thread().fail_current(text, pc);
}

}  // namespace simt
