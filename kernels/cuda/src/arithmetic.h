// What every kernel uses: the machine, constants, the arc-cosine kernels of a ReLU, and the head.
//
// All of kernels/cuda/src is one program: `plan.py` puts the plan's constants, native/src/
// arc_cosine_coefficients.h and these files together, in order. There is no #include, so that NVRTC
// needs no header, and only the first lines below name the machine, whose part a CPU can play
// (tests/kernels/emulator.h).
#ifndef KIP_EMULATED
#define KIP_KERNEL(blocks) extern "C" __global__ void __launch_bounds__(kThreads, blocks)
#define KIP_SHARED(name) extern __shared__ double name[]

namespace kip {
inline int thread() { return threadIdx.x; }
inline int block() { return blockIdx.x; }
inline int blocks() { return gridDim.x; }
inline void sync() { __syncthreads(); }

// In float32 to 2^-22.9 and to one unit in the last place; in float64 to rounding.
inline float inverse_root(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
inline float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
inline double inverse_root(double x) { return rsqrt(x); }
inline double reciprocal(double x) { return 1 / x; }
inline float square_root(float x) { return __fsqrt_rn(x); }
inline double square_root(double x) { return __dsqrt_rn(x); }
}  // namespace kip
#endif

namespace kip {

inline constexpr double kPi = 3.14159265358979324;

// The largest relative difference that is taken for rounding: docs/kernel.md, "Spread" and "The
// cusp".
template <class T>
inline constexpr T kRounding = sizeof(T) == 4 ? T(5e-7) : T(4e-15);

// The share of each entry in the readout's mean, and the factor of a convolution's box sums.
inline constexpr double kReadoutShare = 1.0 / double(kReadoutCount);
inline constexpr Real kScale = Real(kWeight / 9);

// Calls f(e) for each 0 <= e < count, spread over all threads of all blocks.
template <class F>
inline void for_each_index(long long count, F f) {
  for (long long e = (long long)block() * kThreads + thread(); e < count;
       e += (long long)blocks() * kThreads)
    f(e);
}

template <class T>
inline T larger(T a, T b) {
  return a > b ? a : b;
}
template <class T>
inline T smaller(T a, T b) {
  return a < b ? a : b;
}

// Functions of an angle.
template <class T>
struct Angle {
  T sine;       // over pi
  T dot, rest;  // rest = 1/2 - dot
  T slope;      // -d(dot)/d(gap), 0 where the sine is 0
};

// The angle with cosine c, given gap = (1 - c) / pi; dot = 1/2 - acos(c) / 2 pi. is_signed: c can
// be negative. As in native/src/relu.h, but not doubled.
template <class T>
inline Angle<T> angle(T gap, bool is_signed) {
  constexpr int degree = sizeof(ArcCosine<T>::powers) / sizeof(T) - 1;
  const T far = T(2 / kPi) - gap;
  const T sine2 = is_signed ? larger(gap * far, T(0)) : gap * far;
  const T inverse = sine2 > 0 ? inverse_root(sine2) : T(0);
  const T near = is_signed ? smaller(far, gap) : gap,
          z = sizeof(T) == 8 ? 1 - T(2 * kPi) * near : near;
  T value = ArcCosine<T>::powers[degree];
#pragma unroll
  for (int i = degree - 1; i >= 0; --i) value = value * z + ArcCosine<T>::powers[i];
  const T sine = sine2 * inverse, part = sine * value, other = T(0.5) - part;
  const bool obtuse = is_signed && far < gap;
  return {sine, obtuse ? part : other, obtuse ? other : part, inverse * T(0.5 / kPi)};
}

// The adjoint of a ReLU at one point: sets nt_bar_in = n_bar + t_bar and t_bar_in of its input, and
// adds s1 s1_bar to sigma. dot_slope = t d(dot)/dn, sine_slope = s1 d(n')/d(s1). Results may be
// arguments.
template <class T>
inline void relu_vjp(T n_bar, T t_bar, T n, T dot, T dot_slope, T sine_slope, T& nt_bar_in,
                     T& t_bar_in, T& sigma) {
  const T slope = t_bar * dot_slope;
  nt_bar_in = (n_bar + t_bar) * dot + slope;
  t_bar_in = t_bar * dot;
  sigma += n_bar * sine_slope - slope * n;
}

// Calls f(l, the variance of hidden ReLU l's input) for each l, given the variance q at the
// readout.
template <class F>
inline void for_each_hidden(double q, F f) {
  for (int l = 0; l < kHidden; ++l) {
    q = q * kWeight + kBias;
    f(l, q);
    q /= 2;
  }
}

// What follows the readout, hidden Dense + ReLU layers and the output: docs/kernel.md, "The head".
// kernel: its value. n_bar, t_bar: its derivatives by n and t at the readout. sigma [kHidden]:
// those by the first image's deviations, each times the deviation.
struct Head {
  double kernel, n_bar, t_bar, sigma[kHidden + 1];

  // n, t, q1, q2: the covariances and the variances at the readout.
  Head(double n, double t, double q1, double q2) {
    double saved[kHidden + 1][4];
    for (int l = 0; l < kHidden; ++l) {
      n = n * kWeight + kBias, t = t * kWeight + n;
      q1 = q1 * kWeight + kBias, q2 = q2 * kWeight + kBias;
      const double product = q1 * q2, inverse = product > 0 ? 1 / (kPi * square_root(product)) : 0;
      const double gap = 1 / kPi - n * inverse;
      const Angle<double> a =
          angle<double>(larger(gap, -gap) < kRounding<double> / 8 ? 0 : gap, true);
      saved[l][0] = n, saved[l][1] = a.dot;
      saved[l][2] = t * (a.slope * inverse), saved[l][3] = square_root(product) / 2 * a.sine;
      q1 /= 2, q2 /= 2;
      n = n * a.dot + saved[l][3], t = t * a.dot;
    }
    kernel = n * kWeight + kBias;
    if (!kNngp) kernel += t * kWeight;
    n_bar = kWeight, t_bar = kNngp ? 0 : kWeight;
    for (int l = kHidden - 1; l >= 0; --l) {
      double nt_bar_in, t_bar_in;
      sigma[l] = 0;
      relu_vjp(n_bar, t_bar, saved[l][0], saved[l][1], saved[l][2], saved[l][3], nt_bar_in,
               t_bar_in, sigma[l]);
      n_bar = nt_bar_in * kWeight, t_bar = t_bar_in * kWeight;
    }
  }
};

}  // namespace kip
