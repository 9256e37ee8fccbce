// What follows the readout: hidden Dense + ReLU layers, and the output. A number a pair, so that it
// is all in double: a layer's cosine may be so near to 1 that a rounding of float32 is more than
// what the gradient depends on.
#pragma once

#include <cmath>
#include <vector>

#include "lines.h"

namespace kip {

template <class T>
inline constexpr int kParts =
    sizeof(double) / sizeof(T);  // vectors of double for as many lanes as a vector of T has

// A double a lane.
template <class T>
struct Lanes {
  VectorD part[kParts<T>] = {};
  double get(int lane) const { return part[lane / kLanes<double>][lane % kLanes<double>]; }
  void set(int lane, double value) { part[lane / kLanes<double>][lane % kLanes<double>] = value; }

  template <class F>
  static Lanes from(F f) {
    Lanes lanes;
    for (int lane = 0; lane < kLanes<T>; ++lane) lanes.set(lane, f(lane));
    return lanes;
  }
  Vector<T> narrowed() const {
    Vector<T> values;
    for (int lane = 0; lane < kLanes<T>; ++lane) values[lane] = T(get(lane));
    return values;
  }
};

// See Image; correctly rounded, which halves the rounding of cosines.
template <class T>
T inverse(T q) {
  return q > 0 ? T(1 / std::sqrt(kPi * double(q))) : T(0);
}
template <class T>
T deviation(T q) {
  return std::sqrt(q / 2);
}

// What this part needs of an image: its variance and its spread at the readout; then of each hidden
// layer the inverse and the deviation.
inline Index head_size(const Plan& plan) {
  return plan.network.hidden ? 2 + 2 * plan.network.hidden : 0;
}

// Calls f(l, q): the variance of hidden layer l's input, given that at the readout.
template <class F>
void for_each_hidden(const Plan& plan, double q, F f) {
  for (int l = 0; l < plan.network.hidden; ++l) {
    q = q * plan.network.w + plan.network.b;
    f(l, q);
    q *= 0.5;
  }
}

// readout: variance and spread.
inline void fill_head(const Plan& plan, const double* readout, double* head) {
  std::copy(readout, readout + std::min<Index>(2, head_size(plan)), head);
  for_each_hidden(plan, readout[0], [&](int l, double q) {
    head[2 + 2 * l] = inverse(q), head[3 + 2 * l] = deviation(q);
  });
}

// Of a left image and as many right ones as a vector of T has lanes: head[size], and
// head[size][lanes].
template <class T>
class Head {
 public:
  using V = VectorD;

  explicit Head(const Plan& plan)
      : plan_(plan),
        w_(plan.network.w),
        b_(plan.network.b),
        hidden_(plan.network.hidden * kParts<T>) {}

  // The covariance at the readout, given the mean half squared distance there.
  Lanes<T> covariance(const double* left, const V* right, const Lanes<T>& m) const {
    Lanes<T> n;
    for (int k = 0; k < kParts<T>; ++k) {
      const V spreads = left[1] + right[kParts<T> + k], variances = left[0] + right[k],
              distance = m.part[k] - spreads / 2;
      // The m below it are good to sqrt(m q) times an ulp.
      const V rounding = double(kRounding<T>) / 4 * square_root(spreads * (spreads + variances));
      n.part[k] = variances / 2 - (distance < rounding ? V{} : distance);
    }
    return n;
  }

  // The kernel, given the readout's covariances.
  Lanes<T> forward(const double* left, const V* right, const Lanes<T>& n, const Lanes<T>& t) {
    Lanes<T> kernel;
    for (int k = 0; k < kParts<T>; ++k)
      kernel.part[k] = forward(left, right + k, n.part[k], t.part[k], k);
    return kernel;
  }

  // After `forward`: the derivatives of the kernel by n and t; f(l, those by hidden layer l's
  // deviation, each times the deviation).
  template <class F>
  void backward(Lanes<T>& n_bar, Lanes<T>& t_bar, F f) const {
    n_bar = t_bar = {};
    for (int k = 0; k < kParts<T>; ++k)
      n_bar.part[k] += w_, t_bar.part[k] += plan_.network.nngp ? 0 : w_;
    for (int l = plan_.network.hidden; l-- > 0;) {
      Lanes<T> sigma;
      for (int k = 0; k < kParts<T>; ++k) {
        const Hidden& h = hidden_[l * kParts<T> + k];
        V nt_bar_in, t_bar_in;
        pull_back<true, Relu<false, false>>(n_bar.part[k], t_bar.part[k], h.n, h.dot, h.dot_slope,
                                            h.sine_slope, nt_bar_in, t_bar_in, sigma.part[k]);
        n_bar.part[k] = nt_bar_in * w_, t_bar.part[k] = t_bar_in * w_;
      }
      f(l, sigma);
    }
  }

 private:
  struct Hidden {
    V n, dot, dot_slope, sine_slope;
  };

  V forward(const double* left, const V* right, V n, V t, int k) {
    for (int l = 0; l < plan_.network.hidden; ++l) {
      n = n * w_ + b_, t = t * w_ + n;
      const int e = 2 + 2 * l;
      const V inverse = left[e] * right[e * kParts<T>], rest = 1 / kPi - n * inverse;
      const Angle<V> a = angle<true>(absolute(rest) < kRounding<double> / 8 ? V{} : rest);
      const V dot = 0.5 - a.rest * 0.5,
              sine_slope = left[e + 1] * right[(e + 1) * kParts<T>] * a.sine * 0.5;
      hidden_[l * kParts<T> + k] = {n, dot, t * (a.dot_slope * inverse) * 0.5, sine_slope};
      n = n * dot + sine_slope, t = t * dot;
    }
    n = n * w_ + b_;
    return plan_.network.nngp ? n : t * w_ + n;
  }

  const Plan& plan_;
  const double w_, b_;
  std::vector<Hidden> hidden_;
};

// Adds sum_e left(g, e, part) right[e] to out[g], e < size, in double. Pairs and variances of
// fully-connected networks both come from here: the covariance of identical images must equal their
// variance to the bit.
template <class T, int kCount, class F>
KIP_INLINE inline void add_products(F left, const VectorD* right, Index size,
                                    Lanes<T> (&out)[kCount]) {
  VectorD sums[kCount][kParts<T>] = {};
  for (Index e = 0; e < size; ++e)
    for (int g = 0; g < kCount; ++g)
      for (int k = 0; k < kParts<T>; ++k) sums[g][k] += left(g, e, k) * right[e * kParts<T> + k];
  for (int g = 0; g < kCount; ++g)
    for (int k = 0; k < kParts<T>; ++k) out[g].part[k] += sums[g][k];
}

inline constexpr Index kRun = 128;  // of numbers summed at a time, so that rounding stays small,
                                    // and which are in double in L1

template <class T>
struct Run {
  VectorD values[kRun * kParts<T>];
  Run(const Vector<T>* from, Index size) {
    const T* numbers = reinterpret_cast<const T*>(from);
    double* to = reinterpret_cast<double*>(values);
    for (Index e = 0; e < size * kLanes<T>; ++e) to[e] = numbers[e];
  }
};

// The products, summed, of left images [kCount] and those in the lanes of `right`.
template <class T, int kCount>
void dot_products(const T* const (&left)[kCount], const Vector<T>* right, Index size,
                  Lanes<T> (&out)[kCount]) {
  for (auto& value : out) value = {};
  for (Index first = 0; first < size; first += kRun) {
    const Index count = std::min(kRun, size - first);
    const Run<T> run(right + first, count);
    double images[kCount][kRun];
    for (int g = 0; g < kCount; ++g) std::copy(left[g] + first, left[g] + first + count, images[g]);
    add_products<T>([&](int g, Index e, int) { return spread<VectorD>(images[g][e]); }, run.values,
                    count, out);
  }
}

// Those of the images in the lanes with themselves.
template <class T>
Lanes<T> squares(const Vector<T>* pixels, Index size) {
  Lanes<T> out[1];
  for (Index first = 0; first < size; first += kRun) {
    const Index count = std::min(kRun, size - first);
    const Run<T> run(pixels + first, count);
    add_products<T>([&](int, Index e, int k) { return run.values[e * kParts<T> + k]; }, run.values,
                    count, out);
  }
  return out[0];
}

}  // namespace kip
