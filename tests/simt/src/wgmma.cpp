// wgmma. The product is made at some moment between issue and wait, by the seed, from what then lies in
// shared memory. The accumulators' values live beside the registers meanwhile; the registers hold poison, and
// touching them is reported.
#include <cstring>

#include "machine.h"
#include "simt/async.h"
#include "simt/float_formats.h"

namespace simt {
namespace {

constexpr int kRows = 64;

int element_bytes(Element e) { return e == Element::kF16 || e == Element::kBF16 ? 2 : 1; }
int depth(Element e) { return 32 / element_bytes(e); }  // k of one instruction: 32 bytes

double value(Element e, uint32_t bits) {
  switch (e) {
    case Element::kF16: return widen<5, 10>(bits);
    case Element::kBF16: return widen<8, 7>(bits);
    case Element::kE4M3: return widen_e4m3(bits);
    case Element::kS8: return (signed char)bits;
  }
  __builtin_unreachable();
}

// A tile in shared memory by its descriptor: the address of each of its elements.
struct Tile {
  unsigned char* block;  // where address 0 of the block lies
  unsigned start, leading, stride, row_bytes;
  int bytes;             // of an element
  bool major_mn;

  Tile(const Block& block, uint64_t descriptor, const Wgmma& form, bool major_mn)
      : block(block.cluster->arena + block.rank * block.cluster->stride),
        start(unsigned(descriptor & 0x3fff) << 4),
        leading(unsigned(descriptor >> 16 & 0x3fff) << 4),
        stride(unsigned(descriptor >> 32 & 0x3fff) << 4),
        row_bytes(16u << ((4 - int(descriptor >> 62)) & 3)),
        bytes(element_bytes(form.element)),
        major_mn(major_mn) {}

  // Of row `mn` of a, or column `mn` of b. PTX ISA 9.7.15.5.1.2: canonical layouts, then the swizzle on
  // address bits.
  unsigned address(int mn, int k) const {
    const unsigned across = unsigned(major_mn ? k : mn), along = unsigned(major_mn ? mn : k) * bytes;
    const bool swapped = major_mn && row_bytes == 16;  // without a swizzle the two offsets change places
    const unsigned at = start + across % 8 * row_bytes + across / 8 * (swapped ? leading : stride) + along % row_bytes +
                        along / row_bytes * (swapped ? stride : leading);
    return at ^ ((at >> 3) & (row_bytes - 16));
  }

  uint32_t bits(int mn, int k) const {
    uint32_t b = 0;
    std::memcpy(&b, block + address(mn, k), bytes);
    return b;
  }
};

// One warp's or the whole warpgroup's part of a tile, chunk by chunk of 16 bytes: in bounds, ordered before,
// then recorded.
void read_tile(const Thread& thread, const Thread& leader, const Wgmma& form, const Tile& tile, int begin, int end,
               uint32_t epoch, const void* pc) {
  Cluster& cluster = *thread.owner->cluster;
  const int chunk = 16 / tile.bytes, num_k = depth(form.element);
  for (int mn = begin; mn < end; mn += tile.major_mn ? chunk : 1) {
    for (int k = 0; k < num_k; k += tile.major_mn ? 1 : chunk) {
      const unsigned at = tile.address(mn, k);
      if (at + 16 > cluster.shared_bytes)
        fail("out of bounds: %s reads 16 bytes at byte 0x%x of shared memory, which has %zu bytes", form.what, at,
             cluster.shared_bytes);
      cluster.shadow->access_async(thread, Shadow::kRead, form.what, tile.block - cluster.arena + at, 16,
                                   cluster.shadow->agent_of(leader.tid, AsyncOp::kWgmma), epoch, true, pc);
    }
  }
}

struct Part {
  Wgmma form;
  Thread* thread;
  const void* pc;
};

// From here on this thread's d is poison; its value waits for the products.
std::shared_ptr<std::vector<uint32_t>> take_accumulators(const Part& part, int group) {
  Thread& t = *part.thread;
  char* const d = static_cast<char*>(part.form.d);
  const size_t bytes = 4 * part.form.num_registers;
  for (Thread::WgmmaRegisters& r : t.wgmma_registers) {
    if (r.value == nullptr || d + bytes <= r.begin || d >= r.begin + r.bytes) continue;
    if (r.begin != d || r.bytes != bytes)
      fail("%s on registers of which the wgmma issued at %s writes a part", part.form.what, where(r.pc).c_str());
    r.pc = part.pc, r.group = group;
    return r.value;
  }
  auto value = std::make_shared<std::vector<uint32_t>>(part.form.num_registers);
  std::memcpy(value->data(), d, bytes);
  std::memset(d, 0xff, bytes);
  t.wgmma_registers.push_back({d, bytes, value, part.pc, group});
  return value;
}

struct Operands {
  std::shared_ptr<std::vector<uint32_t>> d[kWarpgroupSize];
  uint32_t a[kWarpgroupSize][4];
};

// Products are exact, summed in double (or int) and rounded once, as in the twin of mma.sync.
void multiply(const Wgmma& form, const Operands& operands, const Tile& tile_a, const Tile& tile_b) {
  const int num_k = depth(form.element), n = 2 * form.num_registers, per_register = num_k / 8, width = 32 / per_register;
  std::vector<double> a(kRows * num_k), b(n * num_k);
  for (int row = 0; row < kRows; ++row) {
    for (int k = 0; k < num_k; ++k) {
      const int lane = row / 16 * 32 + row % 8 * 4 + k / per_register % 4, i = row % 16 / 8 + k / (num_k / 2) * 2;
      const uint32_t element = form.a == nullptr ? tile_a.bits(row, k) : operands.a[lane][i] >> k % per_register * width;
      a[row * num_k + k] = value(form.element, element & ((1u << width) - 1));
    }
  }
  for (int column = 0; column < n; ++column) {
    for (int k = 0; k < num_k; ++k) b[column * num_k + k] = value(form.element, tile_b.bits(column, k));
  }
  for (unsigned lane = 0; lane < kWarpgroupSize; ++lane) {
    for (int i = 0; i < form.num_registers; ++i) {
      const int row = lane / 32 * 16 + lane % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      double sum = 0;
      for (int k = 0; k < num_k; ++k) sum += a[row * num_k + k] * b[column * num_k + k];
      uint32_t& d = (*operands.d[lane])[i];
      if (form.element == Element::kS8) d = (form.accumulate ? d : 0) + uint32_t(int32_t(sum));
      else d = simt::bits<uint32_t>(form.accumulate ? float(simt::bits<float>(d) + sum) : float(sum));
    }
  }
}

// Run by the last thread that arrives, for all.
void issue(LaneArguments lanes) {
  const auto part = [&](unsigned lane) -> Part& { return *static_cast<Part*>(lanes[lane]); };
  const Part& first = part(0);
  const Wgmma& form = first.form;
  Thread& leader = *first.thread;
  const int group = int(leader.group_epochs[AsyncOp::kWgmma].size());
  for (unsigned lane = 0; lane < kWarpgroupSize; ++lane) {
    const Part& p = part(lane);
    if (p.form.desc_a != form.desc_a || p.form.desc_b != form.desc_b || p.form.accumulate != form.accumulate ||
        p.form.num_registers != form.num_registers || (p.form.a == nullptr) != (form.a == nullptr))
      fail("%s with other descriptors, shape or scale in %s than in %s", form.what, describe(*p.thread).c_str(),
           describe(leader).c_str());
    if (int(p.thread->group_epochs[AsyncOp::kWgmma].size()) != group)
      fail("%s, before which %s has committed another number of groups than %s", form.what, describe(*p.thread).c_str(),
           describe(leader).c_str());
    if (!p.thread->wgmma_fenced) fail("missing wgmma.fence: %s touches registers with none since the last commit", form.what);
  }

  const uint32_t epoch = ++leader.async_now[AsyncOp::kWgmma];
  const Tile tile_a(*leader.owner, form.desc_a, form, form.major_mn_a), tile_b(*leader.owner, form.desc_b, form, form.major_mn_b);
  auto operands = std::make_shared<Operands>();
  for (unsigned lane = 0; lane < kWarpgroupSize; ++lane) {
    const Part& p = part(lane);
    if (lane % kWarpSize == 0) {  // for its warp: 16 rows of a, all of b
      const int row = int(lane / kWarpSize) * 16;
      if (form.a == nullptr) read_tile(*p.thread, leader, form, tile_a, row, row + 16, epoch, p.pc);
      read_tile(*p.thread, leader, form, tile_b, 0, 2 * form.num_registers, epoch, p.pc);
    }
    operands->d[lane] = take_accumulators(p, group);
    if (p.form.a == nullptr) continue;
    std::memcpy(operands->a[lane], p.form.a, sizeof operands->a[lane]);
    p.thread->wgmma_registers.push_back(
        {reinterpret_cast<char*>(const_cast<unsigned*>(p.form.a)), sizeof operands->a[lane], nullptr, p.pc, group});
  }
  auto op = std::make_shared<AsyncOp>();
  op->issuer = &leader;
  op->kind = AsyncOp::kWgmma;
  op->group = group;
  op->effect = [form, operands, tile_a, tile_b] { multiply(form, *operands, tile_a, tile_b); };
  Machine::of_this_thread().issue(std::move(op));
}

Thread& leader_of(const Thread& thread) { return *thread.owner->threads[thread.warp / 4 * kWarpgroupSize]; }

}  // namespace

void wgmma(const Wgmma& form) {
  Part part{form, Machine::of_this_thread().current, __builtin_return_address(0)};
  warpgroup_collective(form.what, &part, issue, part.pc);
}

void wgmma_fence() { Machine::of_this_thread().current->wgmma_fenced = true; }

void wgmma_commit_group() {
  Thread& me = *Machine::of_this_thread().current;
  me.wgmma_fenced = false;
  me.group_epochs[AsyncOp::kWgmma].push_back(leader_of(me).async_now[AsyncOp::kWgmma]);
}

void wgmma_wait_group(int pending, std::initializer_list<const void*> registers) {
  Machine& machine = Machine::of_this_thread();
  Thread& me = *machine.current;
  const int num_done = int(me.group_epochs[AsyncOp::kWgmma].size()) - pending;
  machine.wait_group(AsyncOp::kWgmma, pending, leader_of(me));
  std::erase_if(me.wgmma_registers, [&](const Thread::WgmmaRegisters& r) {
    if (r.group >= num_done) return false;
    if (r.value != nullptr) {
      if (std::find(registers.begin(), registers.end(), r.begin) == registers.end())
        fail("wgmma_wait_group does not name the accumulators of the wgmma issued at %s: the compiler may use them before it",
             where(r.pc).c_str());
      std::memcpy(r.begin, r.value->data(), r.bytes);
    }
    return true;
  });
  watched = me.wgmma_registers.empty() ? nullptr : &me;
}

}  // namespace simt
