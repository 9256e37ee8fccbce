// One offset of a level, forward and back, row by row. docs/kernel.md has the mathematics
// ("Offsets" to "The backward sweep"), and what is particular to these loops ("One row at a time"):
// rows and bands hold twice m (or n) and twice t, and half the cotangents of n and t.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>

#include "memory.h"
#include "plan.h"
#include "relu.h"

namespace kip {

// The left image of a pair (L = T), or as many right images as there are lanes (L = Vector<T>),
// with what is known of each image on its own. Variances q are indexed as in Level::first_variance,
// pooled values as in Level::first_pooled.
template <class L>
struct Image {
  const L* pixels;     // [H, W, D]
  const L* inverse;    // [convolution variances]: (pi q)^-1/2, 0 where q = 0
  const L* deviation;  // [convolution variances]: (q / 2)^1/2
  const L* pooled;     // [pooled]
  const std::conditional_t<std::is_arithmetic_v<L>, double, VectorD>* head;  // [head_size], head.h
};

// What enters one level at all its offsets, [Level::size] each: m (or n) and t, doubled; in the
// backward sweep, level by level, their cotangents in its place.
template <class V>
struct Band {
  V* n = nullptr;
  V* t = nullptr;
};

// Three consecutive rows of one quantity. A row outside is one of zeros, or of ghosts; column
// `width` of each is 0, or ghosts.
template <class V>
struct ThreeRows {
  const V *above, *here, *below;

  KIP_INLINE V column(int x) const { return above[x] + here[x] + below[x]; }
};

// The 3x3 box sums of three rows, two columns at a time.
template <class V>
class BoxSums {
 public:
  // kGhosts: column -1 exists; else it counts 0.
  template <bool kGhosts>
  KIP_INLINE BoxSums(ThreeRows<V> rows, std::bool_constant<kGhosts>)
      : rows_(rows), left_(kGhosts ? rows.column(-1) : V{}), here_(rows.column(0)) {}

  // Sets the sums around columns x and x + 1. Must be called for x = 0, 2, ... in order.
  KIP_INLINE void two(int x, V& first, V& second) {
    const V right = rows_.column(x + 1), next = rows_.column(x + 2), both = here_ + right;
    first = left_ + both, second = both + next;
    left_ = right, here_ = next;
  }

  // The sum around column x, the next one.
  KIP_INLINE V one(int x) const { return left_ + here_ + rows_.column(x + 1); }

 private:
  const ThreeRows<V> rows_;
  V left_, here_;
};

// Calls f(x, 3x3 box sum of a around x) for 0 <= x < width.
template <class V, class F>
KIP_INLINE inline void for_each_box(ThreeRows<V> a, int width, F f) {
  BoxSums<V> sums(a, std::false_type{});
  for (int i = 0; i < width / 2; ++i) {
    V first, second;
    sums.two(2 * i, first, second);
    f(2 * i, first), f(2 * i + 1, second);
  }
  if (width % 2) f(width - 1, sums.one(width - 1));
}

// Calls f(x, box sum of a, box sum of b) likewise.
template <class V, class F>
KIP_INLINE inline void for_each_box(ThreeRows<V> a, ThreeRows<V> b, int width, F f) {
  BoxSums<V> a_sums(a, std::false_type{}), b_sums(b, std::false_type{});
  for (int i = 0; i < width / 2; ++i) {
    V a_first, a_second, b_first, b_second;
    a_sums.two(2 * i, a_first, a_second);
    b_sums.two(2 * i, b_first, b_second);
    f(2 * i, a_first, b_first), f(2 * i + 1, a_second, b_second);
  }
  if (width % 2) f(width - 1, a_sums.one(width - 1), b_sums.one(width - 1));
}

// One row of what the adjoint of a ReLU needs of its forward. All but n are doubled.
template <class V>
struct Saved {
  V* n;
  V* dot;
  V* dot_slope;   // t d(dot)/dn
  V* sine_slope;  // s1 d(n')/d(s1), at fixed n
};

// One row of the two images' tables, at the pixels y and y + d.
template <class L, class V>
struct ReluRow {
  const L *inverse1, *deviation1;
  const V *inverse2, *deviation2;
};

// A ReLU's input at one point, not doubled.
template <class V>
struct ReluInput {
  V m, n, t;
  V inverse, deviation;  // products of the two pixels'
  V gap;                 // (1 - cosine) / pi
};

// A kind of ReLU. kFirst: it follows the network's first convolution, where t = n and cosines can
// be negative. kZeros: variances can be 0, and patches multiples of each other.
template <bool kFirst_, bool kZeros_>
struct ReluKind {
  static constexpr bool kFirst = kFirst_, kZeros = kZeros_;
};

// Calls f(x, inputs) with the output of a convolution, which is a ReLU's input, for 0 <= x < width:
// two points at a time, inputs[j] being that at x + j, and a single one at the end of an odd width.
// The chain of operations through one point is so long that a processor's window holds few; two
// side by side keep it busy, if `f` stores nothing until both are done.
template <bool kNtk, class Kind, class L, class V, class F>
KIP_INLINE inline void for_each_input(ThreeRows<V> m, ThreeRows<V> t, int width, Scalar<V> scale,
                                      ReluRow<L, V> relu, F f) {
  constexpr bool kSumsOfT = kNtk && !Kind::kFirst;
  const auto at = [&](int x, V box_m, V box_t) KIP_INLINE {
    ReluInput<V> input;
    const V s1 = broadcast<V>(relu.deviation1[x]), s2 = relu.deviation2[x], radial = s1 - s2;
    input.m = box_m * scale;
    V chord = input.m - radial * radial;  // sqrt(q1 q2) (1 - cosine)
    input.inverse = broadcast<V>(relu.inverse1[x]) * relu.inverse2[x];
    input.deviation = s1 * s2;
    if (Kind::kZeros) {
      constexpr auto rounding = kRounding<Scalar<V>> / 2;
      const V square = input.m * (input.m + 2 * input.deviation);
      chord = chord > V{} && chord * chord > rounding * rounding * square ? chord : V{};
    }
    // Where lengths are far apart, the rounding of m exceeds what cosines allow.
    const V largest = input.deviation * (Kind::kFirst ? 4 : 2);
    chord = chord < largest ? chord : largest;
    input.n = 2 * input.deviation - chord;
    input.t = kSumsOfT ? box_t * scale + input.n : input.n;
    input.gap = chord * input.inverse;
    if (Kind::kZeros)
      input.gap = input.inverse > V{} ? input.gap : broadcast<V>(Scalar<V>(1 / kPi));
    return input;
  };
  BoxSums<V> m_sums(m, std::true_type{}), t_sums(kSumsOfT ? t : m, std::false_type{});
  for (int i = 0; i < width / 2; ++i) {
    V box_m[2], box_t[2] = {};
    m_sums.two(2 * i, box_m[0], box_m[1]);
    if (kSumsOfT) t_sums.two(2 * i, box_t[0], box_t[1]);
    const ReluInput<V> inputs[] = {at(2 * i, box_m[0], box_t[0]),
                                   at(2 * i + 1, box_m[1], box_t[1])};
    f(2 * i, inputs);
  }
  if (const int x = width - 1; width % 2) {
    const ReluInput<V> inputs[] = {at(x, m_sums.one(x), kSumsOfT ? t_sums.one(x) : V{})};
    f(x, inputs);
  }
}

// The angles of some inputs.
template <class Kind, class V, int kCount>
KIP_INLINE inline std::array<Angle<V>, kCount> angles(const ReluInput<V> (&inputs)[kCount]) {
  std::array<Angle<V>, kCount> result;
  for (int j = 0; j < kCount; ++j) result[j] = angle<Kind::kFirst>(inputs[j].gap);
  return result;
}

// The cells that a row of a level's output is added to, or takes its cotangents from: entry x
// belongs to n[x % 2][x / 2], and t alike, for x < count.
template <class V>
struct Cells {
  V *n[2], *t[2];
  int count;
};

// Destinations of `forward_row`. kDistances: they take 2 m, not 2 n.

// A row of the next layer's input.
template <class V>
struct StoreRow {
  static constexpr bool kDistances = true;
  V *n, *t;
  template <bool kNtk>
  KIP_INLINE void emit(int x, V n_value, V t_value) const {
    n[x] = n_value;
    if constexpr (kNtk) t[x] = t_value;
  }
};

// The level's output, each entry weighted by `share`.
template <class V, bool kAsDistances>
struct AddToCells {
  static constexpr bool kDistances = kAsDistances;
  Cells<V> cells;
  Scalar<V> share;
  template <bool kNtk>
  KIP_INLINE void emit(int x, V n_value, V t_value) const {
    cells.n[x & 1][x >> 1] += n_value * share;
    if constexpr (kNtk) cells.t[x & 1][x >> 1] += t_value * share;
  }
};

// Convolution and ReLU of a row: emits the output to `out`, and stores what the adjoint needs if
// kSave. `m` and `t` are the layer's input; `scale` is that of a box sum of doubled values.
template <bool kNtk, class Kind, bool kSave, class L, class V, class Out>
void forward_row(ThreeRows<V> m, ThreeRows<V> t, int width, Scalar<V> scale, ReluRow<L, V> relu,
                 Out out, Saved<V> saved) {
  for_each_input<kNtk, Kind>(m, t, width, scale, relu, [&](int x, const auto& inputs) KIP_INLINE {
    const auto all = angles<Kind>(inputs);
    constexpr int kCount = std::tuple_size_v<decltype(angles<Kind>(inputs))>;
    V n_out[kCount], t_out[kCount];
    for (int j = 0; j < kCount; ++j) {
      const ReluInput<V>& in = inputs[j];
      const V turned = in.n * all[j].rest, sine_slope = in.deviation * all[j].sine;
      n_out[j] = Out::kDistances ? in.m + turned - sine_slope : in.n - turned + sine_slope;
      t_out[j] = in.t - in.t * all[j].rest;
    }
    for (int j = 0; j < kCount; ++j) {
      const ReluInput<V>& in = inputs[j];
      out.template emit<kNtk>(x + j, n_out[j], t_out[j]);
      if constexpr (kSave) {
        saved.n[x + j] = in.n;
        saved.dot[x + j] = 1 - all[j].rest;
        saved.sine_slope[x + j] = in.deviation * all[j].sine;
        if constexpr (kNtk) saved.dot_slope[x + j] = in.t * (all[j].slope * in.inverse);
      }
    }
  });
}

// The adjoint of a ReLU at one point: sets nt_bar_in = n_bar + t_bar and (unless the ReLU is the
// first) t_bar_in of its input, and adds s1 s1_bar to sigma. n_bar and t_bar are halved and `dot`,
// `dot_slope` and `sine_slope` doubled, or none of them: results are neither.
template <bool kNtk, class Kind, class V>
KIP_INLINE inline void relu_vjp(V n_bar, V t_bar, V n, V dot, V dot_slope, V sine_slope,
                                V& nt_bar_in, V& t_bar_in, V& sigma) {
  if constexpr (kNtk) {
    const V slope = t_bar * dot_slope;
    nt_bar_in = (n_bar + t_bar) * dot + slope;
    if constexpr (!Kind::kFirst) t_bar_in = t_bar * dot;
    sigma += n_bar * sine_slope - slope * n;
  } else {
    nt_bar_in = n_bar * dot;
    sigma += n_bar * sine_slope;
  }
}

// The turn from forward to backward: convolution and ReLU of a row of the level's last layer, and
// at once the adjoint of that ReLU at the cotangents in `cells`.
template <bool kNtk, class Kind, class L, class V>
void turn_row(ThreeRows<V> m, ThreeRows<V> t, Scalar<V> scale, ReluRow<L, V> relu, Cells<V> cells,
              V* __restrict nt_bar_in, V* __restrict t_bar_in, V* __restrict sigma) {
  for_each_input<kNtk, Kind>(
      m, t, cells.count, scale, relu, [&](int x, const auto& inputs) KIP_INLINE {
        const auto all = angles<Kind>(inputs);
        constexpr int kCount = std::tuple_size_v<decltype(angles<Kind>(inputs))>;
        V nt_bar[kCount], t_bar[kCount], added[kCount] = {};
        for (int j = 0; j < kCount; ++j) {
          const ReluInput<V>& in = inputs[j];
          const V n_bar_out = cells.n[(x + j) & 1][(x + j) >> 1],
                  t_bar_out = kNtk ? cells.t[(x + j) & 1][(x + j) >> 1] : V{};
          relu_vjp<kNtk, Kind>(n_bar_out, t_bar_out, in.n, 1 - all[j].rest,
                               kNtk ? in.t * (all[j].slope * in.inverse) : V{},
                               in.deviation * all[j].sine, nt_bar[j], t_bar[j], added[j]);
        }
        for (int j = 0; j < kCount; ++j) {
          nt_bar_in[x + j] = nt_bar[j];
          if constexpr (kNtk && !Kind::kFirst) t_bar_in[x + j] = t_bar[j];
          sigma[x + j] += added[j];
        }
      });
  nt_bar_in[cells.count] = t_bar_in[cells.count] = V{};
}

// The adjoint of the next layer's convolution, whose output has the cotangents nt_bar and t_bar,
// then of this row's ReLU, as `relu_vjp`.
template <bool kNtk, class Kind, class V>
void backward_row(ThreeRows<V> nt_bar, ThreeRows<V> t_bar, int width, Scalar<V> scale,
                  Saved<V> saved, V* __restrict nt_bar_in, V* __restrict t_bar_in,
                  V* __restrict sigma) {
  const auto at = [&](int x, V n_bar, V t_bar) KIP_INLINE {
    relu_vjp<kNtk, Kind>(n_bar * scale, t_bar * scale, saved.n[x], saved.dot[x],
                         kNtk ? saved.dot_slope[x] : V{}, saved.sine_slope[x], nt_bar_in[x],
                         t_bar_in[x], sigma[x]);
  };
  if constexpr (kNtk) {
    for_each_box(nt_bar, t_bar, width, at);
  } else {
    for_each_box(nt_bar, width, [&](int x, V box) KIP_INLINE { at(x, box, V{}); });
  }
}

// Sets out[x], x < width, to box sums times `scale`.
template <class V>
void scaled_box_row(ThreeRows<V> a, int width, Scalar<V> scale, V* __restrict out) {
  for_each_box(a, width, [&](int x, V box) KIP_INLINE { out[x] = box * scale; });
}

// A row of the network's input, from pixels [W, D] of both images: 2 n, or 2 m if kDistances.
// kChannels = D, or 0 for any number.
template <int kChannels, bool kDistances, class L, class V>
void input_row(const L* left, const V* right, int width, int channels, V* __restrict out) {
  using T = Scalar<V>;
  const int count = kChannels ? kChannels : channels;
  const T share = T(kDistances ? 1 : 2) / T(count);
  const auto term = [&](int c) KIP_INLINE {
    const V difference = broadcast<V>(left[c]) - right[c];
    return kDistances ? difference * difference : broadcast<V>(left[c]) * right[c];
  };
  for (int x = 0; x < width; ++x, left += count, right += count) {
    V sum = term(0);
    for (int c = 1; c < count; ++c) sum += term(c);
    out[x] = sum * share;
  }
}

// The adjoint of the first convolution and of the input: adds to pixel_bar [W, D]. `scale` includes
// the 1 / D of the input's mean over channels.
template <int kChannels, class V>
void pixel_cotangents_row(ThreeRows<V> nt_bar, int width, Scalar<V> scale, const V* right,
                          int channels, V* __restrict pixel_bar) {
  const int count = kChannels ? kChannels : channels;
  for_each_box(nt_bar, width, [&](int x, V box) KIP_INLINE {
    const V n_bar = box * scale;
    for (int c = 0; c < count; ++c) pixel_bar[x * count + c] += n_bar * right[x * count + c];
  });
}

// Twice the pooled m, given twice the mean of m over two windows, the sum of both windows' spreads
// and that of both pooled variances. 0 where it is no more than rounding.
template <class V>
KIP_INLINE inline V less_spreads(V mean, V spreads, V variances, Scalar<V> rounding) {
  const V m = mean - spreads;
  return m < rounding / 2 * square_root(spreads * (spreads + variances)) ? V{} : m;
}

// Streams the offsets of one level through its layers: O(convs H W) a call. L: see Image. kNtk: n
// and t, else n alone. Owns the rows in flight, so each thread needs its own.
template <class T, class L, bool kNtk>
class Lines {
 public:
  using V = Vector<T>;

  explicit Lines(const Plan& plan)
      : plan_(plan),
        scale_(plan.convolution_scale() / 2),
        row_size_(plan.max_width + 2),
        zeros_(row_size_),
        ghosts_(std::max(plan.max_convs, 1) * 2 * row_size_),
        rows_(std::max(plan.max_convs, 1) * 2 * kRows * row_size_),
        bars_(rows_.size()),
        saved_(plan.max_convs * saved_rows(0, plan.max_convs) * 4 * row_size_) {}

  // Sets the pairs that the next calls are about.
  void set_images(Image<L> left, Image<V> right) { left_ = left, right_ = right; }

  // Adds the output of level p at offset d, times to.share, to the cells to.row(y); as distances if
  // to.distances(). `band` is the level's input (unused at level 0, which reads the pixels).
  template <class To>
  void forward(int p, Offset d, Band<V> band, To& to) {
    begin(p, d, band);
    const int k = level_->convs, h = rect_.height;
    for (int step = 0; step < h + k; ++step) {
      if (step < h) load_input(step);
      for (int l = 0; l < k - 1; ++l)
        if (const int y = step - 1 - l; y >= 0 && y < h)
          forward_layer<false>(l, y, rect_.width, store_row(l + 1, y));
      if (const int y = step - k; y >= 0 && y < h) {
        if (const Cells<V> cells = to.row(y); !cells.count) {
          continue;
        } else if (k && to.distances()) {
          forward_layer<false>(k - 1, y, cells.count, AddToCells<V, true>{cells, to.share});
        } else if (k) {
          forward_layer<false>(k - 1, y, cells.count, AddToCells<V, false>{cells, to.share});
        } else {
          const V *n = n_row(0, y), *t = kNtk && level_->has_ntk ? t_row(0, y) : zeros_.data();
          for (int x = 0; x < cells.count; ++x)
            AddToCells<V, false>{cells, to.share}.template emit<kNtk>(x, n[x], t[x]);
        }
      }
    }
  }

  // The adjoint of `forward`, at the cotangents in the cells from.row(y). Cotangents of the level's
  // input replace the band, divided by 16, the share of the pooling before it; at level 0 they are
  // added to pixel_bar [H, W, D]. s1 s1_bar of each ReLU's input is added to sigma [variances].
  template <class From>
  void backward(int p, Offset d, Band<V> band, From& from, V* pixel_bar, V* sigma) {
    begin(p, d, band);
    const int k = level_->convs, h = rect_.height;
    for (int step = 0; step < h + 2 * k; ++step) {
      if (step < h) load_input(step);
      for (int l = 0; l < k - 1; ++l)
        if (const int y = step - 1 - l; y >= 0 && y < h)
          forward_layer<true>(l, y, rect_.width, store_row(l + 1, y));
      if (const int y = step - k; k && y >= 0 && y < h) turn(y, from.row(y), sigma);
      for (int l = k - 2; l >= 0; --l)
        if (const int y = step - 2 * k + 1 + l; y >= 0 && y < h) backward_layer(l, y, sigma);
      if (const int y = step - 2 * k; y >= 0)
        k ? input_cotangents(y, pixel_bar) : input_cotangents(y, from.row(y), pixel_bar);
    }
  }

 private:
  static constexpr int kRows = 3;  // of a layer in flight: the next one replaces the first

  // Rows of layer l between their forward and their adjoint.
  static int saved_rows(int l, int convs) { return std::max(1, 2 * (convs - l) - 1); }

  // Makes ready for an offset: zero columns, ghost rows.
  void begin(int p, Offset d, Band<V> band) {
    level_ = &plan_.levels[p], p_ = p, d_ = d, band_ = band, rect_ = level_->rectangle(d);
    for (std::size_t row = 1; row < rows_.size(); row += row_size_)
      rows_[row + rect_.width] = bars_[row + rect_.width] = V{};
    for (int l = 0; l < level_->convs; ++l) {
      fill_ghosts(l, rect_.y - 1, ghost_row(l, 0));
      fill_ghosts(l, rect_.y + rect_.height, ghost_row(l, 1));
    }
  }

  // Sets row [-1, width] to the ghosts of layer l's input at row y of the left image (above or
  // below the rectangle), which only one of the images has.
  void fill_ghosts(int l, int y, V* row) {
    if (!d_.dy) return std::fill(row - 1, row + rect_.width + 1, V{});
    const bool left = y >= 0 && y < level_->height;
    const Index first = left ? Index(y) * level_->width : Index(y + d_.dy) * level_->width;
    for (int x = -1; x <= rect_.width; ++x) {
      const int column = rect_.x + x + (left ? 0 : d_.dx);
      const bool inside = column >= 0 && column < level_->width;
      row[x] = !inside ? V{}
               : left  ? broadcast<V>(ghost(left_, l, first + column))
                       : ghost(right_, l, first + column);
    }
  }

  // 2 m of layer l's input where only `image` has a pixel: its q.
  template <class I>
  I ghost(const Image<I>& image, int l, Index pixel) const {
    if (l) {
      const I s = image.deviation[variance(l - 1) + pixel];
      return s * s;
    }
    if (p_) return image.pooled[level_->first_pooled + level_->pixels() + pixel];
    I sum{};
    for (int c = 0; c < plan_.channels; ++c)
      sum += image.pixels[pixel * plan_.channels + c] * image.pixels[pixel * plan_.channels + c];
    return sum / T(plan_.channels);
  }

  V* ghost_row(int l, int below) { return ghosts_.data() + (2 * l + below) * row_size_ + 1; }

  void set_ghost_columns(int l, int y) {
    V* row = n_row(l, y);
    if (!d_.dx) {
      row[-1] = row[rect_.width] = V{};
    } else if (d_.dx > 0) {
      row[-1] = ghost(right_, l, right_pixel(y) - 1);
      row[rect_.width] = broadcast<V>(ghost(left_, l, left_pixel(y) + rect_.width));
    } else {
      row[-1] = broadcast<V>(ghost(left_, l, left_pixel(y) - 1));
      row[rect_.width] = ghost(right_, l, right_pixel(y) + rect_.width);
    }
  }

  // Row y of layer l's input, to be filled in; its ghosts are.
  StoreRow<V> store_row(int l, int y) {
    set_ghost_columns(l, y);
    return {n_row(l, y), t_row(l, y)};
  }

  Index band_row(int y) const { return level_->start(d_) + Index(y) * (rect_.width + 1); }
  V* ring(Buffer<V>& buffer, int l, int quantity, int y) {
    return buffer.data() + ((2 * l + quantity) * kRows + y % kRows) * row_size_ + 1;
  }

  // Row y of layer l's input. Layer 0's t, and its n where that is not held as m, are the band
  // itself.
  V* n_row(int l, int y) {
    return l || !p_ || level_->distances ? ring(rows_, l, 0, y) : band_.n + band_row(y);
  }
  V* t_row(int l, int y) { return l || !p_ ? ring(rows_, l, 1, y) : band_.t + band_row(y); }

  // Row y of the cotangents of layer l's ReLU input: n_bar + t_bar, t_bar.
  V* nt_bar_row(int l, int y) { return ring(bars_, l, 0, y); }
  V* t_bar_row(int l, int y) { return ring(bars_, l, 1, y); }

  template <class F>
  ThreeRows<V> three(F row, int y) {
    return {y > 0 ? row(y - 1) : zeros_.data(), row(y),
            y + 1 < rect_.height ? row(y + 1) : zeros_.data()};
  }
  ThreeRows<V> n_rows(int l, int y) {
    return {y > 0 ? n_row(l, y - 1) : ghost_row(l, 0), n_row(l, y),
            y + 1 < rect_.height ? n_row(l, y + 1) : ghost_row(l, 1)};
  }
  ThreeRows<V> t_rows(int l, int y) {
    return three([&](int y) { return t_row(l, y); }, y);
  }
  ThreeRows<V> nt_bar_rows(int l, int y) {
    return three([&](int y) { return nt_bar_row(l, y); }, y);
  }
  ThreeRows<V> t_bar_rows(int l, int y) {
    return three([&](int y) { return t_bar_row(l, y); }, y);
  }

  Saved<V> saved(int l, int y) {
    V* first =
        saved_.data() +
        (l * saved_rows(0, plan_.max_convs) + y % saved_rows(l, level_->convs)) * 4 * row_size_;
    return {first, first + row_size_, first + 2 * row_size_, first + 3 * row_size_};
  }

  Index left_pixel(int y) const { return Index(rect_.y + y) * level_->width + rect_.x; }
  Index right_pixel(int y) const { return left_pixel(y) + Index(d_.dy) * level_->width + d_.dx; }
  Index variance(int l) const { return level_->first_variance + Index(l) * level_->pixels(); }

  ReluRow<L, V> relu(int l, int y) const {
    const Index left = variance(l) + left_pixel(y), right = variance(l) + right_pixel(y);
    return {left_.inverse + left, left_.deviation + left, right_.inverse + right,
            right_.deviation + right};
  }

  // Calls f(kind) with the ReluKind of layer l.
  template <class F>
  void with_relu(int l, F f) const {
    const bool first = !l && !level_->has_ntk;
    if constexpr (sizeof(T) == 4) {  // float64, used little, has one kind: less code
      if (plan_.network.b > 0)
        return first ? f(ReluKind<true, false>{}) : f(ReluKind<false, false>{});
    }
    first ? f(ReluKind<true, true>{}) : f(ReluKind<false, true>{});
  }

  // Calls f(channels) with the channels D as a constant, or 0 for any other number.
  template <class F>
  void with_channels(F f) const {
    if (plan_.channels == 1) return f(std::integral_constant<int, 1>{});
    if (plan_.channels == 3) return f(std::integral_constant<int, 3>{});
    f(std::integral_constant<int, 0>{});
  }

  // Makes row y of the level's input ready: from pixels, or from the band less the spreads.
  void load_input(int y) {
    const bool distances = level_->distances;
    if (!p_) {
      with_channels([&](auto channels) {
        const auto row =
            distances ? input_row<channels, true, L, V> : input_row<channels, false, L, V>;
        row(left_.pixels + left_pixel(y) * plan_.channels,
            right_.pixels + right_pixel(y) * plan_.channels, rect_.width, plan_.channels,
            n_row(0, y));
      });
    } else if (distances) {
      const V *from = band_.n + band_row(y),
              *right = right_.pooled + level_->first_pooled + right_pixel(y);
      const L* left = left_.pooled + level_->first_pooled + left_pixel(y);
      V* to = n_row(0, y);
      for (int x = 0; x < rect_.width; ++x) {
        const V spreads = broadcast<V>(left[x]) + right[x];
        const V variances = broadcast<V>(left[x + level_->pixels()]) + right[x + level_->pixels()];
        to[x] = less_spreads(from[x], spreads, variances, kRounding<T>);
      }
    }
    if (distances) set_ghost_columns(0, y);
  }

  template <bool kSave, class Out>
  void forward_layer(int l, int y, int count, Out out) {
    with_relu(l, [&](auto kind) {
      forward_row<kNtk, decltype(kind), kSave>(n_rows(l, y), t_rows(l, y), count, scale_,
                                               relu(l, y), out, kSave ? saved(l, y) : Saved<V>{});
    });
  }

  // Row y of the last layer, forward and back, given the cotangents of its output in `cells`.
  void turn(int y, Cells<V> cells, V* sigma) {
    const int l = level_->convs - 1;
    if (!cells.count) {
      std::memset(nt_bar_row(l, y), 0, rect_.width * sizeof(V));
      std::memset(t_bar_row(l, y), 0, rect_.width * sizeof(V));
      return;
    }
    with_relu(l, [&](auto kind) {
      turn_row<kNtk, decltype(kind)>(n_rows(l, y), t_rows(l, y), scale_, relu(l, y), cells,
                                     nt_bar_row(l, y), t_bar_row(l, y),
                                     sigma + variance(l) + left_pixel(y));
    });
  }

  void backward_layer(int l, int y, V* sigma) {
    const auto row = !l && !level_->has_ntk ? backward_row<kNtk, ReluKind<true, false>, V>
                                            : backward_row<kNtk, ReluKind<false, false>, V>;
    row(nt_bar_rows(l + 1, y), t_bar_rows(l + 1, y), rect_.width, scale_, saved(l, y),
        nt_bar_row(l, y), t_bar_row(l, y), sigma + variance(l) + left_pixel(y));
  }

  // Row y of the cotangents of the input of a level with convolutions.
  void input_cotangents(int y, V* pixel_bar) {
    if (!p_) {
      return with_channels([&](auto channels) {
        pixel_cotangents_row<channels>(nt_bar_rows(0, y), rect_.width,
                                       2 * scale_ / T(plan_.channels),
                                       right_.pixels + right_pixel(y) * plan_.channels,
                                       plan_.channels, pixel_bar + left_pixel(y) * plan_.channels);
      });
    }
    scaled_box_row(nt_bar_rows(0, y), rect_.width, scale_ / 16, band_.n + band_row(y));
    if (kNtk && level_->has_ntk)
      scaled_box_row(t_bar_rows(0, y), rect_.width, scale_ / 16, band_.t + band_row(y));
  }

  // Row y of the cotangents of the input of a level without, whose output has those in `cells`.
  void input_cotangents(int y, Cells<V> cells, V* pixel_bar) {
    for (int x = 0; x < rect_.width; ++x) {
      const bool inside = x < cells.count;
      if (p_) {
        band_.n[band_row(y) + x] = inside ? cells.n[x & 1][x >> 1] / 16 : V{};
        if (kNtk) band_.t[band_row(y) + x] = inside ? cells.t[x & 1][x >> 1] / 16 : V{};
      } else if (inside) {
        const T share = T(2.0 / plan_.channels);
        const Index left = (left_pixel(y) + x) * plan_.channels,
                    right = (right_pixel(y) + x) * plan_.channels;
        for (int c = 0; c < plan_.channels; ++c)
          pixel_bar[left + c] += cells.n[x & 1][x >> 1] * right_.pixels[right + c] * share;
      }
    }
  }

  const Plan& plan_;
  const T scale_;  // of box sums of doubled values: w / 18
  const Index row_size_;
  Image<L> left_{};
  Image<V> right_{};
  Buffer<V> zeros_, ghosts_, rows_, bars_, saved_;

  // The offset in flight.
  const Level* level_ = nullptr;
  int p_ = 0;
  Offset d_{};
  Rectangle rect_{};
  Band<V> band_;
};

}  // namespace kip
