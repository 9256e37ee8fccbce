// The arc-cosine kernels of a ReLU layer: one square root and one polynomial.
//
// With cosine c = n / sqrt(q1 q2), sine = sqrt(1 - c^2) and dot = (pi - acos c) / 2 pi, a ReLU maps
//   n' = sqrt(q1 q2) sine / 2 pi + n dot,   t' = t dot.
// The variable is gap = (1 - c) / pi, in which sine / pi = sqrt(gap (2 / pi - gap)).
#pragma once

#include <utility>

#include "arc_cosine_coefficients.h"
#include "vector.h"

namespace kip {

// The largest relative difference that is taken for rounding, some units in the last place: docs/
// kernel.md, "Spread" and "The cusp".
template <class T>
inline constexpr T kRounding = sizeof(T) == 4 ? T(5e-7) : T(4e-15);

inline constexpr double kPi = 3.14159265358979324;

// Functions of an angle, all doubled.
template <class V>
struct Angle {
  V sine;   // over pi
  V rest;   // 1/2 - dot
  V slope;  // -d(dot)/d(gap), 0 where the sine is 0
};

// acos(c) / (2 sqrt(1 - c^2)), given (1 - c) / pi with 0 <= c <= 1.
template <class V>
KIP_INLINE inline V arc_cosine_polynomial(V gap) {
  using T = Scalar<V>;
  constexpr auto& powers = ArcCosine<T>::powers;
  constexpr int degree = sizeof(powers) / sizeof(T) - 1;
  if constexpr (sizeof(T) == 8) gap = 1 - T(2 * kPi) * gap;
  V value = broadcast<V>(powers[degree]);
#pragma GCC unroll 32
  for (int i = degree - 1; i >= 0; --i) value = value * gap + powers[i];
  return value;
}

// The angle with cosine c, given gap = (1 - c) / pi. kSigned: c can be negative.
template <bool kSigned, class V>
KIP_INLINE inline Angle<V> angle(V gap) {
  using T = Scalar<V>;
  const V far = T(2 / kPi) - gap;
  const TwiceRoots<V> sine = twice_roots(gap * far);  // rounding can make the square negative
  if constexpr (!kSigned) {
    return {sine.root, sine.root * arc_cosine_polynomial(gap), sine.inverse * T(0.5 / kPi)};
  } else {
    const V part = sine.root * arc_cosine_polynomial(far < gap ? far : gap);
    return {sine.root, far < gap ? 1 - part : part, sine.inverse * T(0.5 / kPi)};
  }
}

}  // namespace kip
