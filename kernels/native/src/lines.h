// The inner loops: one offset d between the pixels of two images, through all layers of one level, row by row.
//
// At fixed d a 3x3 SAME convolution is a 3x3 box sum over y, and a ReLU is pointwise. Rows stream through all layers at once, each layer
// one row behind the one before it, so that only a few rows of each are alive, in L1; the adjoint follows in the same sweep. Each value
// is a vector: one left image against the `kLanes` right images of a tile (or, for variances, as many images each with itself).
//
// NNGP and NTK covariances are `n` and `t`, cotangents end in `bar`.
#pragma once

#include <cstring>

#include "memory.h"
#include "plan.h"
#include "relu.h"

namespace kip {

// L is T where one left image meets all lanes, Vector<T> where each lane has its own.
template <class L>
struct LeftImage {
  const L* pixels;     // [H, W, D]
  const L* inverse;    // [variances]: q^-1/2, 0 where q = 0
  const L* deviation;  // [variances]: q^1/2
};

template <class V>
struct RightImages {
  const V* pixels;     // [H, W, D] / D
  const V* inverse;    // [variances]: q^-1/2, 0 where q = 0
  const V* deviation;  // [variances]: q^1/2 / 2 pi
};

// The covariances (or their cotangents) of one level at all its offsets; see Level::starts.
template <class V>
struct Band {
  V* n = nullptr;
  V* t = nullptr;
};

// Three consecutive rows of one quantity; a row of zeros stands for one outside. Each ends with a zero column.
template <class V>
struct ThreeRows {
  const V *above, *here, *below;
  V column(int x) const { return above[x] + here[x] + below[x]; }
};

// Calls f(x, 3x3 box sum around x) for x < width.
template <class V, class F>
inline void for_each_box(ThreeRows<V> a, int width, F f) {
  V left{}, middle = a.column(0);
  for (int x = 0; x < width; ++x) {
    const V right = a.column(x + 1);
    f(x, left + middle + right);
    left = middle;
    middle = right;
  }
}

// Calls f(x, box sum of a, box sum of b).
template <class V, class F>
inline void for_each_box(ThreeRows<V> a, ThreeRows<V> b, int width, F f) {
  V a_left{}, a_middle = a.column(0), b_left{}, b_middle = b.column(0);
  for (int x = 0; x < width; ++x) {
    const V a_right = a.column(x + 1), b_right = b.column(x + 1);
    f(x, a_left + a_middle + a_right, b_left + b_middle + b_right);
    a_left = a_middle, a_middle = a_right;
    b_left = b_middle, b_middle = b_right;
  }
}

template <class T>
struct Affine {
  T scale, bias;
};

// What the adjoint of a ReLU needs of its forward.
template <class V>
struct Saved {
  V* n;
  V* dot;
  V* dot_slope;   // t d(dot)/dn
  V* sine_slope;  // s1 d(n')/d(s1)
};

// The deviations of one row of a ReLU's input, left and right.
template <class L, class V>
struct ReluRow {
  const L *inverse1, *deviation1;
  const V *inverse2, *deviation2;

  V inverse(int x) const { return spread<V>(inverse1[x]) * inverse2[x]; }
  V deviation(int x) const { return spread<V>(deviation1[x]) * deviation2[x]; }
};

// Calls f(x, n, t) for the convolution's output. kFirst: the network's first convolution, whose NTK is its NNGP.
template <bool kNtk, bool kFirst, class V, class F>
inline void for_each_convolved(ThreeRows<V> n, ThreeRows<V> t, int width, Affine<Scalar<V>> conv, F f) {
  if constexpr (kFirst || !kNtk) {
    for_each_box(n, width, [&](int x, V box) {
      const V value = box * conv.scale + conv.bias;
      f(x, value, value);
    });
  } else {
    for_each_box(n, t, width, [&](int x, V box_n, V box_t) {
      const V value = box_n * conv.scale + conv.bias;
      f(x, value, box_t * conv.scale + value);
    });
  }
}

// Convolution and ReLU of a row.
template <bool kNtk, bool kFirst, bool kSave, class L, class V>
void forward_row(ThreeRows<V> n, ThreeRows<V> t, int width, Affine<Scalar<V>> conv, ReluRow<L, V> relu, V* __restrict n_out, V* __restrict t_out,
                 Saved<V> saved) {
  for_each_convolved<kNtk, kFirst>(n, t, width, conv, [&](int x, V n, V t) {
    const V inverse = relu.inverse(x);
    const Angle<V> a = angle<kFirst>(n, inverse);
    const V sine_slope = relu.deviation(x) * a.sine;
    n_out[x] = n * a.dot + sine_slope;
    if constexpr (kNtk) t_out[x] = t * a.dot;
    if constexpr (kSave) {
      saved.n[x] = n;
      saved.dot[x] = a.dot;
      saved.sine_slope[x] = sine_slope;
      if constexpr (kNtk) saved.dot_slope[x] = t * (inverse_sine(a) * inverse);
    }
  });
}

// The adjoint of a ReLU at one point: sets nt_bar = n_bar + t_bar and t_bar of its input, adds s1 s1_bar to `sigma`.
template <bool kNtk, class V>
inline void pull_back(V n_bar, V t_bar, V n, V dot, V dot_slope, V sine_slope, V& nt_bar_in, V& t_bar_in, V& sigma) {
  if constexpr (kNtk) {
    const V slope = t_bar * dot_slope;
    nt_bar_in = (n_bar + t_bar) * dot + slope;
    t_bar_in = t_bar * dot;
    sigma += n_bar * sine_slope - slope * n;
  } else {
    nt_bar_in = n_bar * dot;
    sigma += n_bar * sine_slope;
  }
}

// Convolution and ReLU of a row of the last layer, and at once the adjoint of that ReLU at n_bar, t_bar.
template <bool kNtk, bool kFirst, class L, class V>
void turn_row(ThreeRows<V> n, ThreeRows<V> t, int width, Affine<Scalar<V>> conv, ReluRow<L, V> relu, const V* n_bar, const V* t_bar,
              V* __restrict nt_bar_in, V* __restrict t_bar_in, V* __restrict sigma) {
  for_each_convolved<kNtk, kFirst>(n, t, width, conv, [&](int x, V n, V t) {
    const V inverse = relu.inverse(x);
    const Angle<V> a = angle<kFirst>(n, inverse);
    V dot_slope{};
    if constexpr (kNtk) dot_slope = t * (inverse_sine(a) * inverse);
    pull_back<kNtk>(n_bar[x], kNtk ? t_bar[x] : V{}, n, a.dot, dot_slope, relu.deviation(x) * a.sine, nt_bar_in[x], t_bar_in[x], sigma[x]);
  });
}

// The adjoint of the convolution above a row, then of its ReLU.
template <bool kNtk, class V>
void backward_row(ThreeRows<V> nt_bar, ThreeRows<V> t_bar, int width, Scalar<V> scale, Saved<V> saved, V* __restrict nt_bar_in,
                  V* __restrict t_bar_in, V* __restrict sigma) {
  const auto at = [&](int x, V n_bar, V t_bar) {
    pull_back<kNtk>(n_bar * scale, t_bar * scale, saved.n[x], saved.dot[x], kNtk ? saved.dot_slope[x] : V{}, saved.sine_slope[x],
                    nt_bar_in[x], t_bar_in[x], sigma[x]);
  };
  if constexpr (kNtk) {
    for_each_box(nt_bar, t_bar, width, at);
  } else {
    for_each_box(nt_bar, width, [&](int x, V box) { at(x, box, V{}); });
  }
}

// Products of pixels, summed over channels. kChannels = 0: any number.
template <int kChannels, class L, class V>
void input_row(const L* left, const V* right, int width, int channels, V* __restrict out) {
  const int count = kChannels ? kChannels : channels;
  for (int x = 0; x < width; ++x, left += count, right += count) {
    V sum = spread<V>(left[0]) * right[0];
    for (int c = 1; c < count; ++c) sum += spread<V>(left[c]) * right[c];
    out[x] = sum;
  }
}

template <int kChannels, class V>
void add_pixel_cotangents(const V* n_bar, const V* right, int width, int channels, V* __restrict pixel_bar) {
  const int count = kChannels ? kChannels : channels;
  for (int x = 0; x < width; ++x, right += count, pixel_bar += count)
    for (int c = 0; c < count; ++c) pixel_bar[c] += n_bar[x] * right[c];
}

// Streams the offsets of one level through its layers. One per thread: it owns the rows that are alive.
template <class T, class L, bool kNtk>
class Lines {
 public:
  using V = Vector<T>;

  explicit Lines(const Plan& plan)
      : plan_(plan), conv_{T(plan.convolution_scale()), T(plan.network.b)}, row_size_(plan.max_width + 1),
        saved_rows_(power_of_two_from(2 * std::max(plan.max_convs, 1))),
        zeros_(row_size_), rows_((plan.max_convs + 1) * kRows * row_size_ * 2), bars_(rows_.size()),
        saved_(plan.max_convs * saved_rows_ * row_size_ * 4), top_(2 * row_size_) {}

  // The images of the pairs; `bands[p]` holds level p's covariances (none for the level 0, computed from pixels).
  void set_images(LeftImage<L> left, RightImages<V> right) { left_ = left, right_ = right; }

  // Calls sink.row(y, n, t) for each row of the level's output for which sink.wants(y).
  template <class Sink>
  void forward(int p, Offset d, Band<V> band, Sink& sink) {
    begin(p, d, band);
    const int k = level_->convs, h = rect_.height;
    if (!k) {
      for (int y = 0; y < h; ++y) load_input(y), sink.row(y, n_row(0, y), kNtk && level_->has_ntk ? t_row(0, y) : zeros_.data());
      return;
    }
    for (int step = 0; step < h + k; ++step) {
      if (step < h) load_input(step);
      for (int l = 0; l < k; ++l) {
        const int y = step - 1 - l;
        if (y < 0 || y >= h || (l == k - 1 && !sink.wants(y))) continue;
        forward_layer<false>(l, y);
        if (l == k - 1) sink.row(y, n_row(k, y), t_row(k, y));
      }
    }
  }

  // The adjoint. source.row(y, n_bar, t_bar) gives the cotangents of the level's output; those of its input replace the band, or are added to
  // pixel_bar [H, W, D] at level 0; s1 s1_bar of each ReLU's input is added to sigma [variances].
  template <class Source>
  void backward(int p, Offset d, Band<V> band, Source& source, V* pixel_bar, V* sigma) {
    begin(p, d, band);
    const int k = level_->convs, h = rect_.height;
    if (!k) {
      for (int y = 0; y < h; ++y) {
        V* n_bar = p ? band_.n + band_row(y) : top_.data();
        source.row(y, n_bar, p && kNtk ? band_.t + band_row(y) : top_.data() + row_size_);
        if (!p) pixel_cotangents(y, n_bar, pixel_bar);
      }
      return;
    }
    for (int step = 0; step < h + 2 * k; ++step) {
      if (step < h) load_input(step);
      for (int l = 0; l < k - 1; ++l)
        if (const int y = step - 1 - l; y >= 0 && y < h) forward_layer<true>(l, y);
      if (const int y = step - k; y >= 0 && y < h) turn(y, source, sigma);
      for (int l = k - 2; l >= 0; --l)
        if (const int y = step - 2 * k + 1 + l; y >= 0 && y < h) backward_layer(l, y, sigma);
      if (const int y = step - 2 * k; y >= 0) input_cotangents(y, pixel_bar);
    }
  }

 private:
  static constexpr int kRows = 4;  // alive at a time: three read, one written; a power of two

  static int power_of_two_from(int n) {
    int power = 1;
    while (power < n) power *= 2;
    return power;
  }

  void begin(int p, Offset d, Band<V> band) {
    level_ = &plan_.levels[p], p_ = p, d_ = d, band_ = band, rect_ = level_->rectangle(d);
    for (std::size_t row = 0; row * row_size_ < rows_.size(); ++row) {
      rows_[row * row_size_ + rect_.width] = V{};
      bars_[row * row_size_ + rect_.width] = V{};
    }
  }

  std::ptrdiff_t band_row(int y) const { return level_->start(d_) + std::ptrdiff_t(y) * (rect_.width + 1); }
  V* ring(Buffer<V>& buffer, int l, int quantity, int y) { return buffer.data() + ((2 * l + quantity) * kRows + (y & (kRows - 1))) * row_size_; }

  // Row y of layer l's input.
  V* n_row(int l, int y) { return l || !p_ ? ring(rows_, l, 0, y) : band_.n + band_row(y); }
  V* t_row(int l, int y) { return l || !p_ ? ring(rows_, l, 1, y) : band_.t + band_row(y); }

  // Of the cotangents of layer l's ReLU input.
  V* nt_bar_row(int l, int y) { return ring(bars_, l, 0, y); }
  V* t_bar_row(int l, int y) { return ring(bars_, l, 1, y); }

  template <class F>
  ThreeRows<V> three(F row, int y) {
    return {y > 0 ? row(y - 1) : zeros_.data(), row(y), y + 1 < rect_.height ? row(y + 1) : zeros_.data()};
  }

  Saved<V> saved(int l, int y) {
    V* first = saved_.data() + (l * saved_rows_ + (y & (saved_rows_ - 1))) * 4 * row_size_;
    return {first, first + row_size_, first + 2 * row_size_, first + 3 * row_size_};
  }

  std::ptrdiff_t left_pixel(int y) const { return std::ptrdiff_t(rect_.y + y) * level_->width + rect_.x; }
  std::ptrdiff_t right_pixel(int y) const { return left_pixel(y) + std::ptrdiff_t(d_.dy) * level_->width + d_.dx; }
  std::ptrdiff_t variance(int l) const { return level_->first_variance + std::ptrdiff_t(l) * level_->pixels(); }

  ReluRow<L, V> relu(int l, int y) const {
    const std::ptrdiff_t left = variance(l) + left_pixel(y), right = variance(l) + right_pixel(y);
    return {left_.inverse + left, left_.deviation + left, right_.inverse + right, right_.deviation + right};
  }

  bool first(int l) const { return !l && !level_->has_ntk; }

  void load_input(int y) {
    if (p_) return;
    const int channels = plan_.channels;
    const auto row = channels == 1 ? input_row<1, L, V> : channels == 3 ? input_row<3, L, V> : input_row<0, L, V>;
    row(left_.pixels + left_pixel(y) * channels, right_.pixels + right_pixel(y) * channels, rect_.width, channels, n_row(0, y));
  }

  template <bool kSave>
  void forward_layer(int l, int y) {
    const auto row = first(l) ? forward_row<kNtk, true, kSave, L, V> : forward_row<kNtk, false, kSave, L, V>;
    row(three([&](int y) { return n_row(l, y); }, y), three([&](int y) { return t_row(l, y); }, y), rect_.width, conv_, relu(l, y),
        ring(rows_, l + 1, 0, y), ring(rows_, l + 1, 1, y), kSave ? saved(l, y) : Saved<V>{});
  }

  template <class Source>
  void turn(int y, Source& source, V* sigma) {
    const int l = level_->convs - 1;
    V *n_bar = top_.data(), *t_bar = n_bar + row_size_;
    if (!source.row(y, n_bar, t_bar)) {
      std::memset(nt_bar_row(l, y), 0, rect_.width * sizeof(V));
      std::memset(t_bar_row(l, y), 0, rect_.width * sizeof(V));
      return;
    }
    const auto row = first(l) ? turn_row<kNtk, true, L, V> : turn_row<kNtk, false, L, V>;
    row(three([&](int y) { return n_row(l, y); }, y), three([&](int y) { return t_row(l, y); }, y), rect_.width, conv_, relu(l, y), n_bar, t_bar,
        nt_bar_row(l, y), t_bar_row(l, y), sigma + variance(l) + left_pixel(y));
  }

  void backward_layer(int l, int y, V* sigma) {
    backward_row<kNtk>(three([&](int y) { return nt_bar_row(l + 1, y); }, y), three([&](int y) { return t_bar_row(l + 1, y); }, y), rect_.width,
                       conv_.scale, saved(l, y), nt_bar_row(l, y), t_bar_row(l, y), sigma + variance(l) + left_pixel(y));
  }

  void input_cotangents(int y, V* pixel_bar) {
    V* n_bar = p_ ? band_.n + band_row(y) : top_.data();
    for_each_box(three([&](int y) { return nt_bar_row(0, y); }, y), rect_.width, [&](int x, V box) { n_bar[x] = box * conv_.scale; });
    if (!p_) return pixel_cotangents(y, n_bar, pixel_bar);
    if constexpr (kNtk) {
      if (!level_->has_ntk) return;
      V* t_bar = band_.t + band_row(y);
      for_each_box(three([&](int y) { return t_bar_row(0, y); }, y), rect_.width, [&](int x, V box) { t_bar[x] = box * conv_.scale; });
    }
  }

  void pixel_cotangents(int y, const V* n_bar, V* pixel_bar) {
    const int channels = plan_.channels;
    const auto add = channels == 1 ? add_pixel_cotangents<1, V> : channels == 3 ? add_pixel_cotangents<3, V> : add_pixel_cotangents<0, V>;
    add(n_bar, right_.pixels + right_pixel(y) * channels, rect_.width, channels, pixel_bar + left_pixel(y) * channels);
  }

  const Plan& plan_;
  const Affine<T> conv_;
  const std::ptrdiff_t row_size_;
  const int saved_rows_;
  LeftImage<L> left_{};
  RightImages<V> right_{};
  Buffer<V> zeros_, rows_, bars_, saved_, top_;

  // The offset being streamed.
  const Level* level_ = nullptr;
  int p_ = 0;
  Offset d_{};
  Rectangle rect_{};
  Band<V> band_;
};

}  // namespace kip
