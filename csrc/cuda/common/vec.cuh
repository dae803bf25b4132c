// Sixteen bytes of elements: the unit in which memory-bound kernels read and write global memory.
#pragma once

#include "cuda/runtime.cuh"

namespace tilestream::cuda {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) { return v; }
template <>
__device__ __forceinline__ __half from_float<__half>(float v) { return __float2half_rn(v); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }

// Rounds v to `dtype` and stores it as element i of p.
__device__ __forceinline__ void store_as(DType dtype, void* p, int64_t i, float v) {
  if (dtype == DType::kFloat32) static_cast<float*>(p)[i] = v;
  else if (dtype == DType::kFloat16) static_cast<__half*>(p)[i] = from_float<__half>(v);
  else static_cast<__nv_bfloat16*>(p)[i] = from_float<__nv_bfloat16>(v);
}

// Element i of p.
__device__ __forceinline__ float load_as(DType dtype, const void* p, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(p)[i];
  if (dtype == DType::kFloat16) return to_float(static_cast<const __half*>(p)[i]);
  return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
}

template <class T>
struct alignas(16) Vec {
  static constexpr int kSize = 16 / int(sizeof(T));
  T at[kSize];
};

// The first `num` elements from p, the rest 0. kAligned: p is 16-byte aligned, and whole vectors take one instruction.
template <bool kAligned, class T>
__device__ __forceinline__ Vec<T> load_vec(const T* p, int64_t num) {
  Vec<T> v;
  if (kAligned && num >= Vec<T>::kSize) {
    v = *reinterpret_cast<const Vec<T>*>(p);
  } else {
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; ++i) v.at[i] = i < num ? p[i] : from_float<T>(0.0f);
  }
  return v;
}

template <bool kAligned, class T>
__device__ __forceinline__ void store_vec(T* p, const Vec<T>& v, int64_t num) {
  if (kAligned && num >= Vec<T>::kSize) {
    *reinterpret_cast<Vec<T>*>(p) = v;
  } else {
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; ++i) {
      if (i < num) p[i] = v.at[i];
    }
  }
}

// Eight neighbours in a row, whatever their type: what a lane takes where one type is turned into another.
template <class T>
struct alignas(8 * sizeof(T) < 16 ? 8 * sizeof(T) : 16) Eight {
  T at[8];
};

// aligned: p is a multiple of the eight's size, up to 16 bytes.
template <class T>
__device__ __forceinline__ Eight<T> load_eight(const T* p, bool aligned) {
  if (aligned) return *reinterpret_cast<const Eight<T>*>(p);
  Eight<T> v;
#pragma unroll
  for (int i = 0; i < 8; ++i) v.at[i] = p[i];
  return v;
}
template <class T>
__device__ __forceinline__ void store_eight(T* p, const Eight<T>& v, bool aligned) {
  if (aligned) {
    *reinterpret_cast<Eight<T>*>(p) = v;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) p[i] = v.at[i];
  }
}

// Whether every row that starts at `p` and goes on by `strides` elements starts at a multiple of 16 bytes.
template <class... Strides>
TILESTREAM_HOST_DEVICE bool rows_aligned(const void* p, int64_t element_bytes, Strides... strides) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && ((int64_t(strides) * element_bytes % 16 == 0) && ...);
}

// Calls f(T{}) with the element type of `dtype`.
template <class F>
void with_element(DType dtype, F f) {
  if (dtype == DType::kFloat32) return f(float{});
  if (dtype == DType::kFloat16) return f(__half{});
  if (dtype == DType::kBFloat16) return f(__nv_bfloat16{});
  throw std::runtime_error("dtype " + std::to_string(int(dtype)) + " has no element type; allowed: float32, float16, bfloat16");
}

}  // namespace tilestream::cuda
