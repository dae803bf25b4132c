// Twin of csrc/cuda/ptx/ldmatrix.cuh.
#pragma once

#include "cuda/runtime.cuh"

namespace simt {

// One lane's row address, checked and read or written for the lane that gives it; and the registers it gets or gives.
struct MatrixLane {
  unsigned short* row;
  unsigned* d;
};

// Not instrumented: the accesses are those of the lanes that gave the addresses, not of the lane that happens to run this.
template <int kNum, bool kTrans, bool kStore>
__attribute__((no_sanitize("thread"))) void move_matrices(LaneArguments lanes) {
  for (int i = 0; i < kNum; ++i) {
    for (int lane = 0; lane < 32; ++lane) {
      unsigned short pair[2];
      unsigned& d = static_cast<MatrixLane*>(lanes[lane])->d[i];
      __builtin_memcpy(pair, &d, 4);
      for (int k = 0; k < 2; ++k) {
        const int row = kTrans ? lane % 4 * 2 + k : lane / 4, column = kTrans ? lane / 4 : lane % 4 * 2 + k;
        unsigned short& element = static_cast<MatrixLane*>(lanes[8 * i + row])->row[column];
        if (kStore) element = pair[k];
        else pair[k] = element;
      }
      if (!kStore) __builtin_memcpy(&d, pair, 4);
    }
  }
}

template <int kNum, bool kTrans, bool kStore>
SIMT_TWIN void matrices(const char* what, unsigned* d, void* row) {
  if (int(self().lane) < 8 * kNum) {
    shared_pointer(what, shared_address(row), 16, 16);
    if (kStore) write(what, row, 16);
    else read(what, row, 16);
  }
  MatrixLane mine{static_cast<unsigned short*>(row), d};
  warp_collective(what, kFullMask, &mine, move_matrices<kNum, kTrans, kStore>);
}

}  // namespace simt

namespace tilestream::ptx {

SIMT_TWIN void ldmatrix_x1(unsigned (&d)[1], const void* row) {
  simt::matrices<1, false, false>("ldmatrix_x1", d, const_cast<void*>(row));
}
SIMT_TWIN void ldmatrix_x2(unsigned (&d)[2], const void* row) {
  simt::matrices<2, false, false>("ldmatrix_x2", d, const_cast<void*>(row));
}
SIMT_TWIN void ldmatrix_x4(unsigned (&d)[4], const void* row) {
  simt::matrices<4, false, false>("ldmatrix_x4", d, const_cast<void*>(row));
}
SIMT_TWIN void ldmatrix_x2_trans(unsigned (&d)[2], const void* row) {
  simt::matrices<2, true, false>("ldmatrix_x2_trans", d, const_cast<void*>(row));
}
SIMT_TWIN void ldmatrix_x4_trans(unsigned (&d)[4], const void* row) {
  simt::matrices<4, true, false>("ldmatrix_x4_trans", d, const_cast<void*>(row));
}
SIMT_TWIN void stmatrix_x4(void* row, const unsigned (&d)[4]) {
  simt::matrices<4, false, true>("stmatrix_x4", const_cast<unsigned*>(d), row);
}
SIMT_TWIN void stmatrix_x2(void* row, const unsigned (&d)[2]) {
  simt::matrices<2, false, true>("stmatrix_x2", const_cast<unsigned*>(d), row);
}
SIMT_TWIN void stmatrix_x4_trans(void* row, const unsigned (&d)[4]) {
  simt::matrices<4, true, true>("stmatrix_x4_trans", const_cast<unsigned*>(d), row);
}

}  // namespace tilestream::ptx
