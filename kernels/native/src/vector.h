// Vectors as wide as the instruction set that this file is compiled for has them.
#pragma once

#if defined(__aarch64__)
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif

#include <cstddef>

#define KIP_INLINE __attribute__((always_inline))

namespace kip {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kRegisters = 32;
#else
inline constexpr int kRegisters = 16;
#endif

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vector = typename VectorOf<T>::type;
using VectorF = Vector<float>;
using VectorD = Vector<double>;

template <class T>
inline constexpr int kLanes = kVectorBytes / sizeof(T);

template <class V>
struct ScalarOf;
template <>
struct ScalarOf<VectorF> {
  using type = float;
};
template <>
struct ScalarOf<VectorD> {
  using type = double;
};
template <class V>
using Scalar = typename ScalarOf<V>::type;

// A vector with x in each lane; or x, which has a number a lane already. For code whose left image
// is one for all lanes, or one a lane.
template <class V>
inline V broadcast(Scalar<V> x) {
  return x - V{};
}
template <class V>
inline V broadcast(V x) {
  return x;
}

#if defined(__AVX512F__)
inline VectorF square_root(VectorF x) { return _mm512_sqrt_ps(x); }
inline VectorD square_root(VectorD x) { return _mm512_sqrt_pd(x); }
inline VectorF estimate_inverse_root(VectorF x) {
  return _mm512_maskz_rsqrt14_ps(_mm512_cmp_ps_mask(x, VectorF{}, _CMP_GT_OQ), x);
}
#elif defined(__AVX2__)
inline VectorF square_root(VectorF x) { return _mm256_sqrt_ps(x); }
inline VectorD square_root(VectorD x) { return _mm256_sqrt_pd(x); }
inline VectorF estimate_inverse_root(VectorF x) {
  return _mm256_and_ps(_mm256_cmp_ps(x, VectorF{}, _CMP_GT_OQ), _mm256_rsqrt_ps(x));
}
#elif defined(__aarch64__)
inline VectorF square_root(VectorF x) { return vsqrtq_f32(x); }
inline VectorD square_root(VectorD x) { return vsqrtq_f64(x); }
// To 16 bits, by a Newton step: Arm's own estimate has 8, where x86 has 12 or 14.
inline VectorF estimate_inverse_root(VectorF x) {
  const float32x4_t estimate = vrsqrteq_f32(x),
                    better = vmulq_f32(estimate, vrsqrtsq_f32(vmulq_f32(x, estimate), estimate));
  return vreinterpretq_f32_u32(vandq_u32(vcgtzq_f32(x), vreinterpretq_u32_f32(better)));
}
#else
inline VectorF square_root(VectorF x) { return _mm_sqrt_ps(x); }
inline VectorD square_root(VectorD x) { return _mm_sqrt_pd(x); }
inline VectorF estimate_inverse_root(VectorF x) {
  return _mm_and_ps(_mm_cmpgt_ps(x, VectorF{}), _mm_rsqrt_ps(x));
}
#endif

// 2 x^1/2 and 2 x^-1/2, both 0 where x <= 0.
template <class V>
struct TwiceRoots {
  V root, inverse;
};

// In float32 to 2e-7: one Newton step costs less than a square root and a division.
inline TwiceRoots<VectorF> twice_roots(VectorF x) {
  const VectorF estimate = estimate_inverse_root(x), root = x * estimate,
                correction = 3 - root * estimate;
  return {root * correction, estimate * correction};
}
inline TwiceRoots<VectorD> twice_roots(VectorD x) {
  const VectorD root = square_root(x > VectorD{} ? x : VectorD{});
  return {2 * root, root > VectorD{} ? 2 / root : VectorD{}};
}

inline VectorD absolute(VectorD x) { return x < VectorD{} ? -x : x; }

}  // namespace kip
