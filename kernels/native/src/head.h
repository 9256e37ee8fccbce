// What follows the readout, hidden Dense + ReLU layers and the output, in float64: docs/kernel.md,
// "The head". Also the readout of fully-connected networks, a dot product of images.
#pragma once

#include <cmath>
#include <vector>

#include "lines.h"

namespace kip {

// Vectors of double that have as many lanes as one vector of T.
template <class T>
inline constexpr int kParts = sizeof(double) / sizeof(T);

// A double for each lane of a vector of T.
template <class T>
struct Lanes {
  VectorD part[kParts<T>] = {};
  double get(int lane) const { return part[lane / kLanes<double>][lane % kLanes<double>]; }
  void set(int lane, double value) { part[lane / kLanes<double>][lane % kLanes<double>] = value; }

  // f(lane) in each lane.
  template <class F>
  static Lanes from(F f) {
    Lanes lanes;
    for (int lane = 0; lane < kLanes<T>; ++lane) lanes.set(lane, f(lane));
    return lanes;
  }

  // Rounded to T.
  Vector<T> narrowed() const {
    Vector<T> values;
    for (int lane = 0; lane < kLanes<T>; ++lane) values[lane] = T(get(lane));
    return values;
  }
};

// (pi q)^-1/2 and (q / 2)^1/2 as in Image; correctly rounded, which halves the rounding of cosines.
template <class T>
T inverse(T q) {
  return q > 0 ? T(1 / std::sqrt(kPi * double(q))) : T(0);
}
template <class T>
T deviation(T q) {
  return std::sqrt(q / 2);
}

// Numbers that the head needs of an image, its `head`: variance and spread at the readout, then
// each hidden layer's inverse and deviation. 0 without hidden layers.
inline Index head_size(const Plan& plan) {
  return plan.network.hidden ? 2 + 2 * plan.network.hidden : 0;
}

// Calls f(l, the variance of hidden ReLU l's input) for each l, given the variance q at the
// readout.
template <class F>
void for_each_hidden(const Plan& plan, double q, F f) {
  for (int l = 0; l < plan.network.hidden; ++l) {
    q = q * plan.network.w + plan.network.b;
    f(l, q);
    q *= 0.5;
  }
}

// Sets head [head_size] from an image's variance and spread at the readout.
inline void fill_head(const Plan& plan, const double* readout, double* head) {
  std::copy(readout, readout + std::min<Index>(2, head_size(plan)), head);
  for_each_hidden(plan, readout[0], [&](int l, double q) {
    head[2 + 2 * l] = inverse(q), head[3 + 2 * l] = deviation(q);
  });
}

// The head of a left image and as many right ones as a vector of T has lanes. `left` is the left
// image's [head_size], `right` the right ones' [head_size, lanes]. Each thread needs its own.
template <class T>
class Head {
 public:
  using V = VectorD;

  explicit Head(const Plan& plan)
      : plan_(plan),
        w_(plan.network.w),
        b_(plan.network.b),
        hidden_(plan.network.hidden * kParts<T>) {}

  // The covariance n at the readout, given the mean m of what it reads, spreads included.
  Lanes<T> covariance(const double* left, const V* right, const Lanes<T>& m) const {
    Lanes<T> n;
    for (int k = 0; k < kParts<T>; ++k) {
      const V spreads = left[1] + right[kParts<T> + k], variances = left[0] + right[k];
      n.part[k] = (variances - less_spreads(2 * m.part[k], spreads, variances, kRounding<T>)) / 2;
    }
    return n;
  }

  // The kernel, given n and t at the readout.
  Lanes<T> forward(const double* left, const V* right, const Lanes<T>& n, const Lanes<T>& t) {
    Lanes<T> kernel;
    for (int k = 0; k < kParts<T>; ++k)
      kernel.part[k] = forward(left, right + k, n.part[k], t.part[k], k);
    return kernel;
  }

  // Requires `forward` just before. Sets the derivatives of the kernel by n and t, and calls f(l,
  // that by the left image's deviation at hidden layer l, times the deviation).
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
        relu_vjp<true, ReluKind<false, false>>(n_bar.part[k], t_bar.part[k], h.n, h.dot,
                                               h.dot_slope, h.sine_slope, nt_bar_in, t_bar_in,
                                               sigma.part[k]);
        n_bar.part[k] = nt_bar_in * w_, t_bar.part[k] = t_bar_in * w_;
      }
      f(l, sigma);
    }
  }

 private:
  // What a hidden layer's adjoint needs; as Saved, but not doubled.
  struct Hidden {
    V n, dot, dot_slope, sine_slope;
  };

  // The kernel of part k of the lanes.
  V forward(const double* left, const V* right, V n, V t, int k) {
    for (int l = 0; l < plan_.network.hidden; ++l) {
      n = n * w_ + b_, t = t * w_ + n;
      const int e = 2 + 2 * l;
      const V inverse = left[e] * right[e * kParts<T>], gap = 1 / kPi - n * inverse;
      const Angle<V> a = angle<true>(absolute(gap) < kRounding<double> / 8 ? V{} : gap);
      const V dot = 0.5 - a.rest * 0.5,
              sine_slope = left[e + 1] * right[(e + 1) * kParts<T>] * a.sine * 0.5;
      hidden_[l * kParts<T> + k] = {n, dot, t * (a.slope * inverse) * 0.5, sine_slope};
      n = n * dot + sine_slope, t = t * dot;
    }
    n = n * w_ + b_;
    return plan_.network.nngp ? n : t * w_ + n;
  }

  const Plan& plan_;
  const double w_, b_;
  std::vector<Hidden> hidden_;
};

// Adds sum_e left(g, e, part) right[e] over e < size to out[g], for each g. The covariance of
// identical images must equal their variance to the bit, so both come from here.
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

// Products summed at a time, so that rounding stays small and what is converted to double stays in
// L1.
inline constexpr Index kRun = 128;

// Up to kRun vectors of T, in double.
template <class T>
struct Run {
  VectorD values[kRun * kParts<T>];
  Run(const Vector<T>* from, Index size) {
    const T* numbers = reinterpret_cast<const T*>(from);
    double* to = reinterpret_cast<double*>(values);
    for (Index e = 0; e < size * kLanes<T>; ++e) to[e] = numbers[e];
  }
};

// Sets out[g] to the dot products of left image g [size] with the images in the lanes of `right`.
template <class T, int kCount>
void dot_products(const T* const (&left)[kCount], const Vector<T>* right, Index size,
                  Lanes<T> (&out)[kCount]) {
  for (auto& value : out) value = {};
  for (Index first = 0; first < size; first += kRun) {
    const Index count = std::min(kRun, size - first);
    const Run<T> run(right + first, count);
    double images[kCount][kRun];
    for (int g = 0; g < kCount; ++g) std::copy(left[g] + first, left[g] + first + count, images[g]);
    add_products<T>([&](int g, Index e, int) { return broadcast<VectorD>(images[g][e]); },
                    run.values, count, out);
  }
}

// The dot products of the images in the lanes with themselves.
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
