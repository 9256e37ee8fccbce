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

// What is no more than rounding, relative to what it is the difference of: identical images must not see the cusp of acos at c = 1.
template <class T>
inline constexpr T kRounding = sizeof(T) == 4 ? T(5e-7) : T(4e-15);

inline constexpr double kPi = 3.14159265358979324;

template <class V>
struct Angle {
  V sine;       // over pi
  V dot, rest;  // rest = 1/2 - dot
  V dot_slope;  // -d(dot)/d(gap), and 0 where the sine is 0; only if asked for
};

// acos(c) / (2 sine), 0 <= c <= 1.
template <class V>
KIP_INLINE inline V arc_cosine_polynomial(V gap) {
  using T = Scalar<V>;
  constexpr auto& powers = ArcCosine<T>::powers;
  constexpr int degree = sizeof(powers) / sizeof(T) - 1;
  if constexpr (sizeof(T) == 8) gap = 1 - T(2 * kPi) * gap;
  V value = spread<V>(powers[degree]);
#pragma GCC unroll 32
  for (int i = degree - 1; i >= 0; --i) value = value * gap + powers[i];
  return value;
}

// kSigned: whether the cosine can be negative; after the first ReLU it cannot.
template <bool kSigned, bool kSlope, class V>
KIP_INLINE inline Angle<V> angle(V gap) {
  using T = Scalar<V>;
  Angle<V> a;
  const V far = T(2 / kPi) - gap;
  V sine2 = gap * far;
  if (kSigned) sine2 = sine2 > V{} ? sine2 : V{};  // c < -1 by rounding
  if constexpr (kSlope) {
    const V inverse = sine2 > V{} ? inverse_root(sine2) : V{};
    a.sine = sine2 * inverse;
    a.dot_slope = inverse * T(0.5 / kPi);
  } else {
    a.sine = square_root(sine2);
  }
  const V part = a.sine * arc_cosine_polynomial(kSigned ? (far < gap ? far : gap) : gap);
  const V other = T(0.5) - part;
  a.dot = kSigned ? (far < gap ? part : other) : other;
  a.rest = kSigned ? (far < gap ? other : part) : part;
  return a;
}

}  // namespace kip
