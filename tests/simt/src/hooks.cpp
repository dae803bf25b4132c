// Every load and store of a kernel. `g++ -fsanitize=thread` emits a call before each; these are its definitions, so no
// thread-sanitizer run-time is linked, and the kernels' sources need no change.
#include "machine.h"

namespace simt {

// The shared memory of the clusters under way on this host thread lies in [begin, end), with other memory between, maybe.
thread_local __attribute__((tls_model("initial-exec"))) SharedRange shared_range;
thread_local __attribute__((tls_model("initial-exec"))) Thread* watched = nullptr;  // current, if wgmma is writing its registers

thread_local __attribute__((tls_model("initial-exec"))) bool kernel_runs = false;
thread_local __attribute__((tls_model("initial-exec"))) bool watches_loads = false;  // of global memory

namespace {

// Whether it is shared memory at all; if so, checked.
bool shared_access(Shadow::Kind kind, const char* what, const void* address, size_t bytes, const void* pc) {
  if (address < shared_range.begin || address >= shared_range.end) return false;
  Machine& machine = Machine::of_this_thread();
  const Thread* me = machine.current;
  Cluster* cluster = machine.cluster_of(address);
  if (cluster == nullptr) return false;
  const size_t offset = static_cast<const unsigned char*>(address) - cluster->arena;
  const size_t in_block = offset % cluster->stride;
  if (cluster != me->owner->cluster)
    machine.fail_current(format("%s: shared memory of a block outside this thread's cluster", what), pc);
  if (in_block + bytes > cluster->shared_bytes)
    machine.fail_current(format("out of bounds: %s of %zu bytes at byte 0x%zx of shared memory, which has %zu bytes", what, bytes,
                                in_block, cluster->shared_bytes), pc);
  cluster->shadow->access(*me, kind, what, offset, bytes, pc);
  return true;
}

void register_access(Shadow::Kind kind, const void* address, size_t bytes, const void* pc) {
  Machine& machine = Machine::of_this_thread();
  const auto* p = static_cast<const char*>(address);
  if (machine.current != watched) return;
  for (const Thread::WgmmaRegisters& r : watched->wgmma_registers) {
    if (p + bytes <= r.begin || p >= r.begin + r.bytes || (r.value == nullptr && kind == Shadow::kRead)) continue;
    machine.fail_current(format("a %s of a register that the wgmma issued at %s is still %s: wgmma.wait_group is missing",
                                kind == Shadow::kRead ? "load" : "store", where(r.pc).c_str(),
                                r.value == nullptr ? "reading" : "writing"), pc);
  }
}

void global_access(Shadow::Kind kind, const void* address, size_t bytes, const void* pc) {
  Machine& machine = Machine::of_this_thread();
  if (machine.current->fiber.holds(address)) return;  // an array of the thread's own
  const char* what = kind == Shadow::kRead ? "a load" : kind == Shadow::kWrite ? "a store" : "an atomic";
  machine.global_access(kind, what, address, bytes, pc);
}

inline void hook(Shadow::Kind kind, const void* address, size_t bytes, const void* pc) {
  if (!kernel_runs) return;  // host code of a kernel's file
  if (shared_access(kind, kind == Shadow::kRead ? "a load" : "a store", address, bytes, pc)) return;
  if (watched != nullptr) register_access(kind, address, bytes, pc);
  if (kind != Shadow::kRead || watches_loads) global_access(kind, address, bytes, pc);
}

}  // namespace

void read(const char* what, const void* address, size_t bytes) {
  shared_access(Shadow::kRead, what, address, bytes, __builtin_return_address(0));
}
void write(const char* what, const void* address, size_t bytes) {
  shared_access(Shadow::kWrite, what, address, bytes, __builtin_return_address(0));
}
void atomic(const char* what, const void* address, size_t bytes) {
  const void* pc = __builtin_return_address(0);
  if (shared_access(Shadow::kAtomic, what, address, bytes, pc)) return;
  global_access(Shadow::kAtomic, address, bytes, pc);
  Machine& machine = Machine::of_this_thread();
  if (machine.global_shadow != nullptr) machine.global_shadow->relaxed(*machine.current, address);
}

void read_global(const char* what, const void* address, size_t bytes) {
  Machine::of_this_thread().global_access(Shadow::kRead, what, address, bytes, __builtin_return_address(0));
}
void write_global(const char* what, const void* address, size_t bytes) {
  Machine::of_this_thread().global_access(Shadow::kWrite, what, address, bytes, __builtin_return_address(0));
}

}  // namespace simt

extern "C" {
#define HOOK(name, kind, bytes) \
  void __tsan_##name(void* address) { simt::hook(simt::Shadow::kind, address, bytes, __builtin_return_address(0)); }
HOOK(read1, kRead, 1) HOOK(read2, kRead, 2) HOOK(read4, kRead, 4) HOOK(read8, kRead, 8) HOOK(read16, kRead, 16)
HOOK(write1, kWrite, 1) HOOK(write2, kWrite, 2) HOOK(write4, kWrite, 4) HOOK(write8, kWrite, 8) HOOK(write16, kWrite, 16)
HOOK(unaligned_read2, kRead, 2) HOOK(unaligned_read4, kRead, 4) HOOK(unaligned_read8, kRead, 8)
HOOK(unaligned_read16, kRead, 16) HOOK(unaligned_write2, kWrite, 2) HOOK(unaligned_write4, kWrite, 4)
HOOK(unaligned_write8, kWrite, 8) HOOK(unaligned_write16, kWrite, 16)
void __tsan_read_range(void* address, size_t bytes) {
  simt::hook(simt::Shadow::kRead, address, bytes, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  simt::hook(simt::Shadow::kWrite, address, bytes, __builtin_return_address(0));
}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

// Atomic builtins go through functions too: here they are themselves. The twins report atomics to the shadow.
#define ATOMIC(bits, T)                                                                                                   \
  T __tsan_atomic##bits##_load(const T* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }                          \
  void __tsan_atomic##bits##_store(T* p, T v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }                          \
  T __tsan_atomic##bits##_fetch_add(T* p, T v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }                \
  int __tsan_atomic##bits##_compare_exchange_strong(T* p, T* want, T v, int, int) {                                       \
    return __atomic_compare_exchange_n(p, want, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                            \
  }                                                                                                                       \
  int __tsan_atomic##bits##_compare_exchange_weak(T* p, T* want, T v, int, int) {                                         \
    return __atomic_compare_exchange_n(p, want, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                            \
  }
ATOMIC(8, uint8_t) ATOMIC(16, uint16_t) ATOMIC(32, uint32_t) ATOMIC(64, uint64_t)
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
}
