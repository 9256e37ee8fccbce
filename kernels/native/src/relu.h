// The arc-cosine kernels of a ReLU layer: one square root and one polynomial.
//
// With cosine c = n / sqrt(q1 q2), sine = sqrt(1 - c^2) and dot = (pi - acos c) / 2 pi, a ReLU maps
//   n' = sqrt(q1 q2) sine / 2 pi + n dot,   t' = t dot.
#pragma once

#include <utility>

#include "arc_cosine_coefficients.h"
#include "vector.h"

namespace kip {

// Below this, 1 - c^2 is rounding (four of c, half an ulp each): identical images must not see the cusp of acos at c = 1. Near-duplicates
// pay for it: in float32, up to 2e-4 of K where images differ by 1e-3 of their size.
template <class T>
inline constexpr T kFlat = sizeof(T) == 4 ? T(5e-7) : T(4e-15);

inline constexpr double kInverseTurn = 0.15915494309189535;  // 1 / 2 pi

template <class V>
struct Angle {
  V sine, dot;
  V dot_slope;  // d(dot)/d(cosine) = 1 / (2 pi sine), and 0 where the sine is 0; only if asked for
};

template <class V>
KIP_INLINE inline V arc_cosine_polynomial(V a) {
  using T = Scalar<V>;
  constexpr auto& powers = ArcCosine<T>::powers;
  constexpr int degree = sizeof(powers) / sizeof(T) - 1;
  if constexpr (sizeof(T) == 8) a = 2 * a - 1;
  V value = spread<V>(powers[degree]);
#pragma GCC unroll 32
  for (int i = degree - 1; i >= 0; --i) value = value * a + powers[i];
  return value;
}

// 1 - cosine^2, 0 where it is no more than rounding.
template <class V>
KIP_INLINE inline V sine2(V cosine) {
  const V value = 1 - cosine * cosine;
  return value < kFlat<Scalar<V>> ? V{} : value;
}

// kSigned: whether the cosine can be negative; after the first ReLU it cannot.
template <bool kSigned, bool kSlope, class V>
KIP_INLINE inline Angle<V> angle(V cosine, V sine2) {
  using T = Scalar<V>;
  Angle<V> a;
  if constexpr (kSlope) {
    const V inverse = sine2 > V{} ? inverse_root(sine2) : V{};
    a.sine = sine2 * inverse;
    a.dot_slope = inverse * T(kInverseTurn);
  } else {
    a.sine = square_root(sine2);
  }
  const V part = a.sine * arc_cosine_polynomial(kSigned ? absolute(cosine) : cosine);
  const V dot = T(0.5) - part;
  a.dot = kSigned ? (cosine < V{} ? part : dot) : dot;
  return a;
}

}  // namespace kip
