#include "cpu/dispatch.h"

#include <dlfcn.h>

#include <cstdlib>
#include <stdexcept>

#include "tilestream/allreduce.h"
#include "tilestream/append_kv.h"
#include "tilestream/attention.h"
#include "tilestream/linear.h"
#include "tilestream/norm.h"
#include "tilestream/quantise.h"
#include "tilestream/sample.h"
#include "tilestream/shard_draw.h"

namespace tilestream::cpu {

#define DECLARE(op, Params) void op(const Params& params);
#define DECLARE_LEVEL(level) \
  namespace level {          \
  TILESTREAM_CPU_OPS(DECLARE) \
  }
DECLARE_LEVEL(portable)
#if defined(__x86_64__)
DECLARE_LEVEL(avx2)
DECLARE_LEVEL(avx512)
DECLARE_LEVEL(avx512_vnni)
#endif

namespace {

struct Level {
  const char* name;
  bool (*supported)();
#define MEMBER(op, Params) void (*op)(const Params&);
  TILESTREAM_CPU_OPS(MEMBER)
};

#define ENTRY(op, Params) , NS::op
#define NS portable
const Level kLevels[] = {
    {"portable", [] { return true; } TILESTREAM_CPU_OPS(ENTRY)},
#undef NS
#if defined(__x86_64__)
#define NS avx2
    {"avx2",
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
     } TILESTREAM_CPU_OPS(ENTRY)},
#undef NS
#define NS avx512
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     } TILESTREAM_CPU_OPS(ENTRY)},
#undef NS
#define NS avx512_vnni
    {"avx512_vnni",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
     } TILESTREAM_CPU_OPS(ENTRY)},
#undef NS
#endif
};

#define WITHOUT_KERNEL(op, Params) \
  void op##_without_kernel(const Params&) { throw std::runtime_error(#op " has no CUDA kernel to emulate"); }
TILESTREAM_CPU_OPS(WITHOUT_KERNEL)

#define WITHOUT_KERNEL_ENTRY(op, Params) , op##_without_kernel
Level simt_level = {"simt", [] { return true; } TILESTREAM_CPU_OPS(WITHOUT_KERNEL_ENTRY)};
bool simt_is_loaded = false;

const Level* find_level(const std::string& name) {
  if (simt_is_loaded && name == simt_level.name) return &simt_level;
  std::string allowed;
  for (const Level& level : kLevels) {
    if (!level.supported()) continue;
    if (name == level.name) return &level;
    allowed += (allowed.empty() ? "" : ", ") + std::string(level.name);
  }
  throw std::invalid_argument("SIMD level '" + name + "' is not one of those this CPU runs: " + allowed +
                              " (set by TILESTREAM_SIMD)");
}

const Level* initial_level() {
  if (const char* env = std::getenv("TILESTREAM_SIMD")) return find_level(env);
  const Level* best = nullptr;
  for (const Level& level : kLevels) {
    if (level.supported()) best = &level;
  }
  return best;
}

const Level*& current() {
  static const Level* level = initial_level();
  return level;
}

}  // namespace

std::string simd_level() { return current()->name; }

std::vector<std::string> simd_levels() {
  std::vector<std::string> names;
  for (const Level& level : kLevels) {
    if (level.supported()) names.emplace_back(level.name);
  }
  return names;
}

void set_simd_level(const std::string& name) { current() = find_level(name); }

void load_simt(const std::string& library) {
  void* const handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) throw std::runtime_error(std::string("the emulator did not load: ") + dlerror());
  const auto find = reinterpret_cast<void* (*)(const char*)>(dlsym(handle, "tilestream_simt_op"));
  if (find == nullptr) throw std::runtime_error(library + " has no tilestream_simt_op");
#define LOAD(op, Params) \
  if (void* const kernel = find(#op)) simt_level.op = reinterpret_cast<void (*)(const Params&)>(kernel);
  TILESTREAM_CPU_OPS(LOAD)
  simt_level.pack_gguf = portable::pack_gguf;  // a GPU's weights are packed on the host too
  simt_level.pack_weight = portable::pack_weight;
  simt_is_loaded = true;
}

void refuse_row_major() {
  throw std::invalid_argument("row-major weights (formats 6 and 7) are for GPUs; pack for the CPU as 0 or 1");
}

#define DEFINE(op, Params) \
  void op(const Params& params) { current()->op(params); }
TILESTREAM_CPU_OPS(DEFINE)

}  // namespace tilestream::cpu
