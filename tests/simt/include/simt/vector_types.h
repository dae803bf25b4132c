// CUDA's built-in vector types, with CUDA's sizes and alignments.
#pragma once

#include <cstddef>
#include <cstdint>

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using longlong = long long;
using ulonglong = unsigned long long;

// NAME1..4 and make_NAME1..4. A vector is aligned to its size, up to 16 bytes; three elements to one of them.
#define SIMT_VECTOR(NAME, T)                                                                        \
  struct NAME##1 { T x; };                                                                          \
  struct alignas(2 * sizeof(T)) NAME##2 { T x, y; };                                                \
  struct NAME##3 { T x, y, z; };                                                                    \
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) NAME##4 { T x, y, z, w; };                \
  inline NAME##1 make_##NAME##1(T x) { return {x}; }                                                \
  inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }                                        \
  inline NAME##3 make_##NAME##3(T x, T y, T z) { return {x, y, z}; }                                \
  inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }

SIMT_VECTOR(char, signed char)
SIMT_VECTOR(uchar, unsigned char)
SIMT_VECTOR(short, short)
SIMT_VECTOR(ushort, unsigned short)
SIMT_VECTOR(int, int)
SIMT_VECTOR(uint, unsigned int)
SIMT_VECTOR(longlong, long long)
SIMT_VECTOR(ulonglong, unsigned long long)
SIMT_VECTOR(float, float)
SIMT_VECTOR(double, double)
#undef SIMT_VECTOR

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
