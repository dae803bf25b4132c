// Bulk copies and tensor copies. Each is made at some moment between its issue and its wait, by the seed;
// from the issue on its bytes in shared memory belong to the thread's asynchronous agent.
#include <cstring>

#include "machine.h"
#include "simt/async.h"

namespace simt {
namespace {

// A new operation of the current thread, whose access to shared memory is on record.
std::shared_ptr<AsyncOp> bulk_op(AsyncOp::Kind kind, const char* what, const void* shared, size_t bytes, const void* pc) {
  Thread& me = *Machine::of_this_thread().current;
  Cluster& cluster = *me.owner->cluster;
  cluster.shadow->access_async(me, kind == AsyncOp::kBulkLoad ? Shadow::kWrite : Shadow::kRead, what,
                               static_cast<const unsigned char*>(shared) - cluster.arena, bytes,
                               cluster.shadow->agent_of(me.tid, kind), ++me.async_now[kind], true, pc);
  auto op = std::make_shared<AsyncOp>();
  op->issuer = &me;
  op->kind = kind;
  op->pc = pc;
  op->group = int(me.group_epochs[kind].size());
  return op;
}

// One block's part of a load: `copy` at its moment, which then counts `bytes` on `address`.
void load(const char* what, void* dst, size_t bytes, uint64_t* address, std::function<void()> copy, const void* pc) {
  Machine& machine = Machine::of_this_thread();
  Mbarrier& bar = find_mbarrier(what, address);
  auto op = bulk_op(AsyncOp::kBulkLoad, what, dst, bytes, pc);
  std::memset(dst, 0xff, bytes);
  const Thread* me = machine.current;
  const int agent = me->owner->cluster->shadow->agent_of(me->tid, AsyncOp::kBulkLoad);
  op->effect = [copy = std::move(copy), bytes, &bar, agent, epoch = me->async_now[AsyncOp::kBulkLoad], seen = me->seen] {
    copy();
    join(bar.clock, *seen);
    bar.clock[agent] = std::max(bar.clock[agent], epoch);
    bar.tx_bytes -= bytes;
    bar.complete_if_full();
  };
  machine.issue(std::move(op));
}

// Reads shared memory, and some time later gives what it read to `write`.
void store(const char* what, const void* src, size_t bytes, std::function<void(const unsigned char*)> write, const void* pc) {
  auto op = bulk_op(AsyncOp::kBulkStore, what, src, bytes, pc);
  Thread& me = *op->issuer;
  const auto held = std::make_shared<std::vector<unsigned char>>();
  op->read = [held, src, bytes] {
    const auto* begin = static_cast<const unsigned char*>(src);
    if (held->empty()) held->assign(begin, begin + bytes);
  };
  op->effect = [held, read = op->read, write = std::move(write)] { read(), write(held->data()); };
  me.last_bulk_store = me.async_now[AsyncOp::kBulkStore], me.last_bulk_store_pc = pc;
  Machine::of_this_thread().issue(std::move(op));
}

void check_bulk(unsigned bytes, const void* global, const void* shared) {
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0)
    fail("cp.async.bulk of %u bytes at global address %p; both must be multiples of 16", bytes, global);
  shared_pointer("cp.async.bulk", shared_address(shared), bytes, 16);
}

// ---- boxes of tensors

struct Box {
  TensorMap map;
  int64_t corner[5] = {};
  size_t bytes;

  Box(const char* what, const TensorMap& map, const int* coordinates, int rank, const void* shared) : map(map) {
    if (rank != map.rank) fail("%s with %d coordinates, of a tensor map of rank %d", what, rank, map.rank);
    bytes = map.element_bytes;
    for (int i = 0; i < rank; ++i) corner[i] = coordinates[i], bytes *= map.box[i];
    shared_pointer(what, shared_address(shared), bytes, 128);
    // The pattern is one of addresses: a box that does not begin with it would be laid out otherwise than
    // wgmma reads it.
    const unsigned pattern = 8 * (map.swizzle_mask + 16);
    if (map.swizzle_mask != 0 && shared_address(shared) % pattern != 0)
      fail("%s: shared address 0x%x is not a multiple of %u, at which its swizzle repeats", what, shared_address(shared),
           pattern);
  }

  // f(offset from `address` in shared memory, place in global memory or null outside the tensor) for each
  // element.
  template <class F>
  void for_each(uint32_t address, F f) const {
    int at[5] = {};
    for (uint32_t offset = 0; offset < bytes; offset += map.element_bytes) {
      char* global = map.base;
      for (int i = 0; i < map.rank && global != nullptr; ++i) {
        const int64_t index = corner[i] + at[i];
        global = index >= 0 && uint64_t(index) < map.size[i] ? global + index * int64_t(map.stride[i]) : nullptr;
      }
      const uint32_t plain = address + offset;
      f((plain ^ ((plain >> 3) & map.swizzle_mask)) - address, global);
      for (int i = 0; i < map.rank && ++at[i] == map.box[i]; ++i) at[i] = 0;
    }
  }
};

}  // namespace

void bulk_load(void* dst, const void* src, unsigned bytes, uint64_t* bar) {
  const void* pc = __builtin_return_address(0);
  check_bulk(bytes, src, dst);
  Machine::of_this_thread().global_access(Shadow::kRead, "cp.async.bulk", src, bytes, pc);
  load("cp.async.bulk", dst, bytes, bar, [dst, src, bytes] { std::memcpy(dst, src, bytes); }, pc);
}

void bulk_store(void* dst, const void* src, unsigned bytes) {
  const void* pc = __builtin_return_address(0);
  check_bulk(bytes, dst, src);
  Machine::of_this_thread().global_access(Shadow::kWrite, "cp.async.bulk", dst, bytes, pc);
  store("cp.async.bulk", src, bytes, [dst, bytes](const unsigned char* read) { std::memcpy(dst, read, bytes); }, pc);
}

void tensor_load(const char* what, void* dst, const TensorMap& map, const int* coordinates, int rank, uint64_t* bar,
                 unsigned ranks) {
  const void* pc = __builtin_return_address(0);
  const Box box(what, map, coordinates, rank, dst);
  const uint32_t address = shared_address(dst);
  if (ranks == 0 || ranks >> self().cluster_size != 0)
    fail("%s to blocks 0x%x of a cluster of %u", what, ranks, self().cluster_size);
  box.for_each(address, [&](uint32_t, const char* global) {
    if (global != nullptr) Machine::of_this_thread().global_access(Shadow::kRead, what, global, map.element_bytes, pc);
  });
  for (unsigned r = 0; r < self().cluster_size; ++r) {
    if ((ranks >> r & 1) == 0) continue;
    auto* to = static_cast<unsigned char*>(map_shared(dst, r));
    const auto copy = [box, to, address] {
      box.for_each(address, [&](uint32_t offset, const char* global) {
        if (global != nullptr) std::memcpy(to + offset, global, box.map.element_bytes);
        else std::memset(to + offset, 0, box.map.element_bytes);
      });
    };
    load(what, to, box.bytes, static_cast<uint64_t*>(map_shared(bar, r)), copy, pc);
  }
}

void tensor_store(const char* what, const TensorMap& map, const int* coordinates, int rank, const void* src) {
  const void* pc = __builtin_return_address(0);
  const Box box(what, map, coordinates, rank, src);
  box.for_each(shared_address(src), [&](uint32_t, const char* global) {
    if (global != nullptr) Machine::of_this_thread().global_access(Shadow::kWrite, what, global, map.element_bytes, pc);
  });
  const auto write = [box, address = shared_address(src)](const unsigned char* read) {
    box.for_each(address, [&](uint32_t offset, char* global) {
      if (global != nullptr) std::memcpy(global, read + offset, box.map.element_bytes);
    });
  };
  store(what, src, box.bytes, write, pc);
}

void bulk_commit_group() {
  Thread& me = *Machine::of_this_thread().current;
  me.group_epochs[AsyncOp::kBulkStore].push_back(me.async_now[AsyncOp::kBulkStore]);
}

void bulk_wait_group(int pending) {
  Machine& machine = Machine::of_this_thread();
  machine.wait_group(AsyncOp::kBulkStore, pending, *machine.current);
}

void bulk_wait_group_read(int pending) {
  Machine& machine = Machine::of_this_thread();
  machine.wait_group(AsyncOp::kBulkStore, pending, *machine.current, true);
}

}  // namespace simt
