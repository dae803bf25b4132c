// The wrappers that ptx.cu, wgmma.cu and tma.cu leave over, each alone: words of data[0..1023] in, from
// data[2048] on out. Run by fidelity.py on the emulator and on a GPU.
#include "cases.h"
#include "cuda/ptx/bulk.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/fp8.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/memory.cuh"

namespace {

using namespace tilestream;

struct Storage {
  alignas(128) unsigned words[512];
  uint64_t full;
};

__device__ __forceinline__ Storage& storage() { return cuda::dynamic_smem<Storage>(); }
__device__ __forceinline__ unsigned* in(float* data) { return reinterpret_cast<unsigned*>(data) + 4 * threadIdx.x; }
__device__ __forceinline__ unsigned* out(float* data) { return reinterpret_cast<unsigned*>(data) + 2048 + 8 * threadIdx.x; }

// One warp; `a` is this lane's four words, `d` its eight results.
#define ALONE(NAME, ...)                                                                       \
  CASE(NAME, .grid = 1, .block = 32, .smem_bytes = sizeof(Storage)) {                          \
    [[maybe_unused]] unsigned *a = in(data), *d = out(data);                                   \
    [[maybe_unused]] const auto f = [](unsigned word) { return __uint_as_float(word); };       \
    __VA_ARGS__                                                                                \
  }

ALONE(lop3, d[0] = ptx::lop3<0xea>(a[0], a[1], a[2]); d[1] = ptx::lop3<0x96>(a[0], a[1], a[2]);)
ALONE(prmt, d[0] = ptx::prmt(a[0], a[1], a[2] & 0x7777); d[1] = ptx::prmt(a[1], a[3], 0x5410);)
ALONE(cvt_bf16x2, d[0] = ptx::cvt_bf16x2(f(a[0]), f(a[1])); d[1] = ptx::cvt_bf16x2(f(a[2]), f(a[3]));)
ALONE(cvt_f16x2, d[0] = ptx::cvt_f16x2(f(a[0]), f(a[1])); d[1] = ptx::cvt_f16x2(f(a[2]), f(a[3]));)
ALONE(cvt_e4m3x2, d[0] = ptx::cvt_e4m3x2(f(a[0]), f(a[1])); d[1] = ptx::cvt_e4m3x2(f(a[2]), f(a[3]));)
ALONE(cvt_f16x2_e4m3x2, for (int i = 0; i < 4; ++i) d[i] = ptx::cvt_f16x2_e4m3x2((unsigned short)(a[i] & 0xffff));)
ALONE(ex2_approx, for (int i = 0; i < 4; ++i) d[i] = __float_as_uint(ptx::ex2_approx(f(a[i])));)

// Fills the tile with this lane's words first.
#define ALONE_TILE(NAME, ...)                                            \
  ALONE(NAME, Storage& s = storage();                                    \
        for (int i = 0; i < 4; ++i) s.words[4 * threadIdx.x + i] = a[i]; \
        __syncwarp(); __VA_ARGS__)

ALONE_TILE(ldmatrix_x1, unsigned m[1]; ptx::ldmatrix_x1(m, &s.words[4 * threadIdx.x]); d[0] = m[0];)
ALONE_TILE(ldmatrix_x2_trans, unsigned m[2]; ptx::ldmatrix_x2_trans(m, &s.words[4 * threadIdx.x]); d[0] = m[0]; d[1] = m[1];)
#define ALONE_STMATRIX(NAME, NUM)                                                                    \
  ALONE_TILE(NAME, unsigned m[NUM]; for (int i = 0; i < NUM; ++i) m[i] = a[i] * 3u; __syncwarp();    \
             ptx::NAME(&s.words[4 * threadIdx.x], m); __syncwarp();                                  \
             for (int i = 0; i < 4; ++i) d[i] = s.words[4 * threadIdx.x + i];)
ALONE_STMATRIX(stmatrix_x2, 2)
ALONE_STMATRIX(stmatrix_x4_trans, 4)

// Every count of bytes, the rest zeros.
template <int kBytes>
__device__ __forceinline__ void copy_some(float* data) {
  Storage& s = storage();
  ptx::cp_async<kBytes>(&s.words[4 * threadIdx.x], in(data), int(threadIdx.x) % (kBytes + 1));
  ptx::cp_async_wait_all();
  for (int i = 0; i < kBytes / 4; ++i) out(data)[i] = s.words[4 * threadIdx.x + i];
}
ALONE(cp_async_4, copy_some<4>(data);)
ALONE(cp_async_8, copy_some<8>(data);)
ALONE(cp_async_16, copy_some<16>(data);)

ALONE(cp_async_bulk, Storage& s = storage();
      if (threadIdx.x == 0) {
        ptx::mbarrier_init(&s.full, 1);
        ptx::fence_mbarrier_init();
        ptx::mbarrier_arrive_expect_tx(&s.full, 2000);
        ptx::cp_async_bulk_load(s.words, data, 2000, &s.full);
      }
      __syncwarp();
      ptx::mbarrier_wait_parity(&s.full, 0);
      s.words[threadIdx.x] ^= 1u;
      ptx::fence_proxy_async();
      __syncwarp();
      if (threadIdx.x == 0) {
        ptx::cp_async_bulk_store(data + 2048, s.words, 2000);
        ptx::cp_async_bulk_commit_group();
        ptx::cp_async_bulk_wait_group<0>();
      })

ALONE(atoms, d[0] = ptx::atom_cas_acq_rel_gpu(d + 1, d[1], a[0]); d[2] = ptx::atom_add_acq_rel_gpu(d + 1, a[1]);
      d[3] = ptx::atom_cas_acq_rel_sys(d + 1, a[0], 5u); d[4] = ptx::atom_add_acq_rel_sys(d + 1, a[2]);
      ptx::red_add_release_gpu(d + 1, a[3]); ptx::red_add_release_sys(d + 1, 7u);
      ptx::st_release_gpu(d + 5, ptx::ld_acquire_gpu(d + 1)); ptx::st_release_sys(d + 6, ptx::ld_acquire_sys(d + 1) + 1u);)

ALONE(ld_nc_no_allocate, const uint4 v = ptx::ld_nc_no_allocate(reinterpret_cast<const uint4*>(a)); d[0] = v.x; d[1] = v.y;
      d[2] = v.z; d[3] = v.w;)

}  // namespace
