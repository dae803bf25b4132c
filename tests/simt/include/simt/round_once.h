#pragma once

#include "simt/twin.h"

namespace simt {
// a * b + c rounded to T once. The double sum may be inexact; made odd then, so that the second rounding is right.
template <class T>
inline T round_once(float a, float b, float c) {
  const double product = double(a) * b, sum = product + c;
  const double back = sum - product, error = (product - (sum - back)) + (c - back);
  unsigned long long word = bits<unsigned long long>(sum);
  if (error != 0 && (word & 1) == 0) word += (error > 0) == (sum > 0) ? 1 : -1;
  const double odd = bits<double>(word);
  float narrow = float(odd);
  if (double(narrow) != odd) {  // to odd again, from double to float
    unsigned bits32 = bits<unsigned>(narrow);
    if ((bits32 & 1) == 0 && narrow - narrow == 0) bits32 += ((odd > narrow) == (narrow > 0)) ? 1 : -1;
    narrow = bits<float>(bits32);
  }
  return T(narrow);
}
}  // namespace simt
