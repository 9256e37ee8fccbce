// One level (resolution) of one pair of images: its offsets, one after the other, through the level's convolutions, forward and back.
//
// At a fixed offset d, covariances n and t, indexed by the pixel y of the first image, form a plane. A thread owns patches of it, `rows` by 2
// pixels: the same ones at every offset, so that what it gathers for the first image (its pixels' and deviations' cotangents) stays in
// registers, in a fixed order, and 2x2 windows of a pooling lie within a thread. Neighbours' values come through planes in shared memory,
// written by all, read by all: one barrier for each convolution or its adjoint. The mathematics is that of native/src/lines.h: n is held as
// m = (q1 + q2) / 2 - n up to the last convolution, and taps that only one image has count q / 2 of it.
//
// Between levels, covariances at all offsets, and then their cotangents in their place, lie in the block's workspace, which a cache holds.
namespace kip {

struct Offset {
  int dy, dx;
};

// Where pixel (y, x) of a plane in global memory is: the even columns of a row, then the odd ones, so that neighbouring threads, which are
// two columns apart, touch neighbouring words.
constexpr int at(int width, int y, int x) { return (2 * y + (x & 1)) * ((width + 1) / 2) + (x >> 1); }

constexpr int plane_size(int height, int width) { return 2 * height * ((width + 1) / 2); }

template <bool kSelf>
constexpr int level_count() {
  return kSelf ? kSelfCount : kPairCount;
}

template <bool kSelf>
constexpr Level level(int p) {
  return kSelf ? kSelfLevels[p] : kPairLevels[p];
}

// kSelf: an image with itself, NNGP alone, for its variances; these fill its table on the way.
template <bool kSelf, int p>
class Sweep {
 public:
  static constexpr Level kLevel = level<kSelf>(p);
  static constexpr bool kLast = p + 1 == level_count<kSelf>();
  static constexpr Level kNext = level<kSelf>(kLast ? p : p + 1);
  static constexpr bool kNtk = !kSelf, kHasNtk = kNtk && kLevel.has_ntk;
  static constexpr bool kDistancesOut = !kLast && kNext.distances;
  static constexpr int kHeight = kLevel.height, kWidth = kLevel.width, kConvs = kLevel.convs, kRows = kLevel.rows;
  static constexpr int kPlane = plane_size(kHeight, kWidth), kHalf = (kWidth + 1) / 2;
  static constexpr int kPatchRows = (kHeight + kRows - 1) / kRows, kPatches = kPatchRows * kHalf;
  static constexpr int kTimes = (kPatches + kThreads - 1) / kThreads, kOwn = kTimes * kRows * 2;
  static constexpr int kLayers = kConvs ? kConvs : 1;  // arrays may not be empty
  static constexpr int kUnroll = kOwn <= 16 && kConvs <= 4 ? kLayers : 1;
  static constexpr bool kWhole = kHeight % kRows == 0 && kWidth % 2 == 0;  // patches cover the plane exactly
  static constexpr int kStride = kLevel.stride, kExchange = (kPatchRows * kRows + 2) * 2 * kStride;
  static constexpr int kRing = 2 * (kHeight + kWidth) + 4;

  // left, right: the images' tables. exchange: 6 planes. bands: the workspace.
  Sweep(const Real* left, const Real* right, Real* exchange, Real* bands)
      : left_(left), right_(right), exchange_(exchange), band_(bands + kLevel.band), next_band_(bands + kNext.band) {
    sync();
    for (int e = thread(); e < 6 * kExchange; e += kThreads) exchange_[e] = 0;
  }

  // The readout's sums of n and t over this thread's pixels.
  double n_sum = 0, t_sum = 0;

  void forward() {
    clear_next();
    sync();
    load_own();
    for_each_offset([&](Offset d) { stream<false>(d); });
    sync();
  }

  // n_bar, t_bar: the readout's cotangents, of the last level.
  void backward(Real n_bar, Real t_bar) {
    n_bar_ = n_bar, t_bar_ = t_bar;
    clear_own();
    sync();
    load_own();
    for_each_offset([&](Offset d) { stream<true>(d); });
    sync();
  }

  // Cotangents of the pixels (at the first level) and of the deviations, each times the deviation, to their places in `derivatives`.
  void store(Real* derivatives) const {
    for_each_pixel([&](int i, int y, int x) {
      if (p == 0)
        for (int c = 0; c < kChannels; ++c) derivatives[c * kPlane + at(kWidth, y, x)] = pixel_bar_[c][i];
      for (int l = 0; l < kConvs; ++l) derivatives[kLevel.sigma + l * kPlane + at(kWidth, y, x)] = sigma_[l][i];
    });
  }

  // Adds the pixels' cotangents, which `backward_self` halved.
  void add_pixels(double* gradient) const {
    for_each_pixel([&](int i, int y, int x) {
      for (int c = 0; c < kChannels; ++c) gradient[c * kPlane + at(kWidth, y, x)] += 2 * double(pixel_bar_[c][i]);
    });
  }

  // An image with itself: fills `table`, which is `left` and `right`, with what the level adds to it. diagonals: two planes.
  void forward_self(Real* table, Real* diagonals) {
    if (!kLast) clear_next();
    sync();
    Real q[kOwn];
    for_each_pixel([&](int i, int y, int x) {
      const int e = at(kWidth, y, x);
      if (p == 0) {
        q[i] = 0;
        for (int c = 0; c < kChannels; ++c) q[i] += left_[c * kPlane + e] * left_[c * kPlane + e];
        q[i] *= Real(1.0 / kChannels);
      } else if (kLevel.distances) {
        // The variance of a mean is the mean variance less the spread, which the band holds at offset 0.
        constexpr int below = level<kSelf>(p ? p - 1 : 0).width;
        const Real* from = diagonals + (p - 1) % 2 * kDiagonal;
        const Real spread = band_[offset_index({0, 0}) * kPlane + e];
        q[i] = (from[at(below, 2 * y, 2 * x)] + from[at(below, 2 * y, 2 * x + 1)] +
                (from[at(below, 2 * y + 1, 2 * x)] + from[at(below, 2 * y + 1, 2 * x + 1)])) * Real(0.25) - spread;
        table[kLevel.halves + kPlane + e] = spread / 2;
      } else {
        q[i] = band_[offset_index({0, 0}) * kPlane + e];
      }
      if (kLevel.distances) table[kLevel.halves + e] = q[i] / 2;
    });
    for (int l = 0; l < kConvs; ++l) {
      convolve_plain(q);
      for_each_pixel([&](int i, int y, int x) {
        q[i] += Real(kBias);
        table[kLevel.deviations + l * kPlane + at(kWidth, y, x)] = square_root(q[i] / 2);
        q[i] /= 2;
      });
    }
    for_each_pixel([&](int i, int y, int x) {
      diagonals[p % 2 * kDiagonal + at(kWidth, y, x)] = q[i];
      if (kLast) n_sum += q[i];
    });
    if (!kLast && !kDistancesOut) pool({0, 0}, q, q);
    sync();
    load_own();
    for_each_offset([&](Offset d) {
      if (d.dy || d.dx) stream<false>(d);
    });
    sync();
  }

  // The adjoint, halved: the part of the pair (x, x) through its left image. sums: the cotangents of the table's deviations, each times the
  // deviation, where `store` would put them.
  void backward_self(Real n_bar, const double* sums) {
    n_bar_ = n_bar, t_bar_ = 0;
    clear_own();
    sync();
    load_own();
    for_each_offset([&](Offset d) {
      if (d.dy || d.dx) stream<true>(d);
    });
    // Offset 0 comes last: it takes what all the others give to the deviations.
    Real q_bar[kOwn], unused[kOwn];
    leaving({0, 0}, q_bar, unused);
    for (int l = kConvs - 1; l >= 0; --l) {
      for_each_pixel([&](int i, int y, int x) {
        const Real q = 2 * s1_[l][i] * s1_[l][i];
        const Real outer = q > 0 ? Real(sums[kLevel.sigma + l * kPlane + at(kWidth, y, x)] / (2 * double(q))) : Real(0);
        q_bar[i] = q_bar[i] / 2 + outer + (q > 0 ? sigma_[l][i] / q : Real(0));
      });
      convolve_plain(q_bar);
    }
    for_each_pixel([&](int i, int y, int x) {
      if (p > 0) band_[offset_index({0, 0}) * kPlane + at(kWidth, y, x)] = q_bar[i] / 16;
      if (p == 0)
        for (int c = 0; c < kChannels; ++c) pixel_bar_[c][i] += q_bar[i] * left_[c * kPlane + at(kWidth, y, x)] * Real(1.0 / kChannels);
    });
    sync();
  }

 private:
  // Threads, patches and pixels.

  template <class F>
  static void for_each_offset(F f) {
    for (int dy = -kLevel.radius_y; dy <= kLevel.radius_y; ++dy)
      for (int dx = -kLevel.radius_x; dx <= kLevel.radius_x; ++dx) f(Offset{dy, dx});
  }

  // Calls f(first index, y, x) for each patch of this thread; (y, x) is its first pixel.
  template <class F>
  static void for_each_patch(F f) {
#pragma unroll(kOwn <= 16 ? kTimes : 1)
    for (int k = 0; k < kTimes; ++k) {
      const int patch = thread() + k * kThreads;
      if (kPatches % kThreads == 0 || patch < kPatches) f(k * kRows * 2, patch / kHalf * kRows, patch % kHalf * 2);
    }
  }

  // The patches that have a pixel y for which y + d exists.
  template <class F>
  static void for_each_patch(Offset d, F f) {
    for_each_patch([&](int first, int y, int x) {
      if (y < kHeight - d.dy && y + kRows > -d.dy && x < kWidth - d.dx && x + 2 > -d.dx) f(first, y, x);
    });
  }

  // Calls f(index, row, column) for the pixels of a patch.
  template <class F>
  static void for_each_in_patch(int first, F f) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < 2; ++c) f(first + 2 * r + c, r, c);
  }

  template <class F>
  static void for_each_pixel(F f) {
    for_each_patch([&](int first, int y, int x) {
      for_each_in_patch(first, [&](int i, int r, int c) {
        if (contains(y + r, x + c)) f(i, y + r, x + c);
      });
    });
  }

  static bool contains(int y, int x) { return unsigned(y) < unsigned(kHeight) && unsigned(x) < unsigned(kWidth); }
  static bool contains(int y, int x, Offset d) { return (kWhole || contains(y, x)) && contains(y + d.dy, x + d.dx); }

  // Of pixel (y, x) + (r, c) + d, x being even: the same for all threads but for its first term.
  static int shifted(int y, int x, int r, int c, Offset d) {
    return at(kWidth, y, x) + 2 * kHalf * (r + d.dy) + ((c + d.dx) & 1) * kHalf + ((c + d.dx) >> 1);
  }

  static int offset_index(Offset d) { return (d.dy + kLevel.radius_y) * (2 * kLevel.radius_x + 1) + d.dx + kLevel.radius_x; }
  static constexpr int offsets(Level level) { return (2 * level.radius_y + 1) * (2 * level.radius_x + 1); }

  // The first image's own.

  void load_own() {
    for_each_pixel([&](int i, int y, int x) {
      if (p == 0)
        for (int c = 0; c < kChannels; ++c) x1_[c][i] = left_[c * kPlane + at(kWidth, y, x)];
      for (int l = 0; l < kConvs; ++l) s1_[l][i] = left_[kLevel.deviations + l * kPlane + at(kWidth, y, x)];
    });
  }

  void clear_own() {
    for (int i = 0; i < kOwn; ++i) {
      for (int c = 0; c < kPixelChannels; ++c) pixel_bar_[c][i] = 0;
      for (int l = 0; l < kLayers; ++l) sigma_[l][i] = 0;
    }
  }

  void clear_next() {
    if (kLast) return;
    constexpr int size = offsets(kNext) * plane_size(kNext.height, kNext.width) * (kNtk && kNext.has_ntk ? 2 : 1);
    for (int e = thread(); e < size; e += kThreads) next_band_[e] = 0;
  }

  // Planes of neighbours.

  // which: 0 has ghosts around it, 1 and 2 have zeros. Two sets take turns, so that writing one need not wait for all to have read the other.
  Real* plane(int which) const { return exchange_ + (3 * set_ + which) * kExchange; }

  static int position(int y, int x) { return (2 * (y + 1) + (x & 1)) * kStride + ((x + 1) >> 1); }

  // 3x3 box sums of the plane around a patch, in place of its values.
  static void box(const Real* plane, int y, int x, Real* own) {
    const Real* corner = plane + position(y, x) - 2 * kStride;
    Real sums[4][kRows];
#pragma unroll
    for (int column = 0; column < 4; ++column) {
      Real w[kRows + 2];
#pragma unroll
      for (int row = 0; row < kRows + 2; ++row) {
        const bool is_own = kWhole && row > 0 && row <= kRows && (column == 1 || column == 2);
        w[row] = is_own ? own[2 * (row - 1) + column - 1]
                        : corner[2 * kStride * row + (column % 2 ? 0 : kStride) + column / 2];
      }
#pragma unroll
      for (int r = 0; r < kRows; r += 2) {
        const Real middle = w[r + 1] + w[r + 2];
        sums[column][r] = w[r] + middle, sums[column][r + 1] = middle + w[r + 3];
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const Real middle = sums[1][r] + sums[2][r];
      own[2 * r] = sums[0][r] + middle, own[2 * r + 1] = middle + sums[3][r];
    }
  }

  void write(Real* to, const Real* values) const {
    for_each_pixel([&](int i, int y, int x) { to[position(y, x)] = values[i]; });
  }

  // A convolution of variances, or of their cotangents.
  void convolve_plain(Real (&q)[kOwn]) {
    write(plane(1), q);
    sync();
    for_each_patch([&](int first, int y, int x) {
      box(plane(1), y, x, q + first);
      for_each_in_patch(first, [&](int i, int, int) { q[i] *= kScale; });
    });
    set_ ^= 1;
  }

  // q / 2 of layer l's input.
  static Real ghost(const Real* table, int l, int e) {
    if (l == 0) return table[kLevel.halves + e];
    const Real s = table[kLevel.deviations + (l - 1) * kPlane + e];
    return s * s / 2;
  }

  // Hands layer l's input round; v and t become its box sums.
  void exchange(int l, Offset d, Real (&v)[kOwn], Real (&t)[kOwn]) {
    const bool with_t = kNtk && (l || kLevel.has_ntk);
    Real *v_plane = plane(0), *t_plane = plane(1);
    for_each_pixel([&](int i, int y, int x) {
      if (!contains(y + d.dy, x + d.dx)) v[i] = ghost(left_, l, at(kWidth, y, x)), t[i] = 0;
      v_plane[position(y, x)] = v[i];
      if (with_t) t_plane[position(y, x)] = t[i];
    });
    for (int e = thread(); e < kRing; e += kThreads) {
      int y, x;
      if (e < 2 * (kWidth + 2)) {
        y = e < kWidth + 2 ? -1 : kHeight, x = e % (kWidth + 2) - 1;
      } else {
        y = (e - 2 * (kWidth + 2)) / 2, x = e % 2 ? kWidth : -1;
      }
      v_plane[position(y, x)] = contains(y + d.dy, x + d.dx) ? ghost(right_, l, at(kWidth, y + d.dy, x + d.dx)) : Real(0);
    }
    sync();
    for_each_patch(d, [&](int first, int y, int x) {
      box(v_plane, y, x, v + first);
      if (with_t) box(t_plane, y, x, t + first);
    });
    set_ ^= 1;
  }

  // The adjoint of the convolution before which n_bar (n_bar + t_bar of its output) and t_bar stand.
  void exchange_back(bool with_t, Offset d, Real (&n_bar)[kOwn], Real (&t_bar)[kOwn]) {
    Real *n_plane = plane(1), *t_plane = plane(2);
    write(n_plane, n_bar);
    if (with_t) write(t_plane, t_bar);
    sync();
    for_each_patch(d, [&](int first, int y, int x) {
      box(n_plane, y, x, n_bar + first);
      if (with_t) box(t_plane, y, x, t_bar + first);
      for_each_in_patch(first, [&](int i, int r, int c) {
        const Real scale = contains(y + r, x + c, d) ? kScale : Real(0);
        n_bar[i] *= scale, t_bar[i] *= scale;
      });
    });
    set_ ^= 1;
  }

  // Pooling.

  // Where a 2x2 window's parts lie in the next band, -1 where it needs none: for an axis with an odd offset, the even pixel's and the odd
  // pixel's; else both pixels' together, first.
  struct Cells {
    int index[2][2];

    Cells(int y, int x, Offset d) {
      const int top = y >> 1, left = x >> 1;
#pragma unroll
      for (int b = 0; b < 2; ++b)
#pragma unroll
        for (int a = 0; a < 2; ++a) {
          const int dy = (d.dy >> 1) + b, dx = (d.dx >> 1) + a;
          const bool wanted = (!b || (d.dy & 1)) && (!a || (d.dx & 1)) && dy >= -kNext.radius_y && dy <= kNext.radius_y &&
                              dx >= -kNext.radius_x && dx <= kNext.radius_x && top < kNext.height && left < kNext.width &&
                              top + dy < kNext.height && left + dx < kNext.width;
          index[b][a] = !wanted ? -1 : ((dy + kNext.radius_y) * (2 * kNext.radius_x + 1) + dx + kNext.radius_x) *
                                           plane_size(kNext.height, kNext.width) + at(kNext.width, top, left);
        }
    }
  };

  Real* next_t() const { return next_band_ + offsets(kNext) * plane_size(kNext.height, kNext.width); }

  // Adds n and t of a patch's rows r, r + 1, pixel by pixel 0 where y + d is none, to the cells.
  static void add(const Cells& cells, Offset d, const Real* v, Real* band) {
    Real old[2][2], row[2][2];
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
      for (int a = 0; a < 2; ++a) old[b][a] = cells.index[b][a] >= 0 ? band[cells.index[b][a]] : Real(0);
#pragma unroll
    for (int r = 0; r < 2; ++r) row[r][0] = d.dx & 1 ? v[2 * r] : v[2 * r] + v[2 * r + 1], row[r][1] = v[2 * r + 1];
#pragma unroll
    for (int a = 0; a < 2; ++a) {
      const Real both = d.dy & 1 ? row[0][a] : row[0][a] + row[1][a];
      if (cells.index[0][a] >= 0) band[cells.index[0][a]] = old[0][a] + both * Real(1.0 / 16);
      if (cells.index[1][a] >= 0) band[cells.index[1][a]] = old[1][a] + row[1][a] * Real(1.0 / 16);
    }
  }

  // Pools a plane at offset d into the next band. Overwrites what lies outside it by 0.
  void pool(Offset d, Real (&v)[kOwn], Real (&t)[kOwn]) const {
    for_each_patch(d, [&](int first, int y, int x) {
      for_each_in_patch(first, [&](int i, int r, int c) {
        if (!contains(y + r, x + c, d)) v[i] = 0, t[i] = 0;
      });
#pragma unroll
      for (int r = 0; r < kRows; r += 2) {
        const Cells cells(y + r, x, d);
        add(cells, d, v + first + 2 * r, next_band_);
        if (kNtk && kNext.has_ntk) add(cells, d, t + first + 2 * r, next_t());
      }
    });
  }

  static void take(const Cells& cells, Offset d, const Real* band, Real* out) {
    Real value[2][2];
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
      for (int a = 0; a < 2; ++a) value[b][a] = cells.index[b][a] >= 0 ? band[cells.index[b][a]] : Real(0);
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const Real above = d.dx & 1 ? value[0][c] : value[0][0], below = d.dx & 1 ? value[1][c] : value[1][0];
        out[2 * r + c] = r && (d.dy & 1) ? below : above;
      }
  }

  // The cotangents of the level's output at offset d; 0 where y + d is none.
  void leaving(Offset d, Real (&n_bar)[kOwn], Real (&t_bar)[kOwn]) const {
    for (int i = 0; i < kOwn; ++i) n_bar[i] = t_bar[i] = 0;
    for_each_patch(d, [&](int first, int y, int x) {
      if constexpr (kLast) {
        for_each_in_patch(first, [&](int i, int, int) { n_bar[i] = n_bar_, t_bar[i] = t_bar_; });
      } else {
#pragma unroll
        for (int r = 0; r < kRows; r += 2) {
          const Cells cells(y + r, x, d);
          take(cells, d, next_band_, n_bar + first + 2 * r);
          if (kNtk && kNext.has_ntk) take(cells, d, next_t(), t_bar + first + 2 * r);
        }
      }
      for_each_in_patch(first, [&](int i, int r, int c) {
        if (!contains(y + r, x + c, d)) n_bar[i] = t_bar[i] = 0;
      });
    });
  }

  // One offset.

  // What enters the level: m or n, and t; finite everywhere.
  void entering(Offset d, Real (&v)[kOwn], Real (&t)[kOwn]) const {
    for (int i = 0; i < kOwn; ++i) v[i] = t[i] = 0;
    for_each_patch(d, [&](int first, int y, int x) {
      for_each_in_patch(first, [&](int i, int r, int c) {
        if (!contains(y + r, x + c, d)) return;
        const int e2 = shifted(y, x, r, c, d);
        if constexpr (p == 0) {
          for (int channel = 0; channel < kChannels; ++channel) {
            const Real x2 = right_[channel * kPlane + e2], difference = x1_[channel][i] - x2;
            v[i] += kLevel.distances ? difference * difference : x1_[channel][i] * x2;
          }
          v[i] *= Real((kLevel.distances ? 0.5 : 1.0) / kChannels);
        } else {
          const int e = at(kWidth, y + r, x + c), from = offset_index(d) * kPlane + e;
          v[i] = band_[from];
          if (kHasNtk) t[i] = band_[offsets(kLevel) * kPlane + from];
          if (kLevel.distances) {
            const Real variances = left_[kLevel.halves + e] + right_[kLevel.halves + e2];
            const Real spreads = left_[kLevel.halves + kPlane + e] + right_[kLevel.halves + kPlane + e2];
            // The m below it are good to sqrt(m q) times an ulp.
            const Real rounding = kRounding<Real> / 2 * square_root(spreads * (spreads + variances));
            v[i] -= spreads;
            if (v[i] < rounding) v[i] = 0;
          }
        }
      });
    });
  }

  template <bool kBackward>
  void stream(Offset d) {
    Real v[kOwn], t[kOwn], n_bar[kOwn], t_bar[kOwn];
    Real n_saved[kLayers][kOwn], dot_saved[kLayers][kOwn], dot_slope_saved[kLayers][kOwn], sine_slope_saved[kLayers][kOwn];
    entering(d, v, t);
    if (kBackward && !kConvs) leaving(d, n_bar, t_bar);
#pragma unroll(kUnroll)
    for (int l = 0; l < kConvs; ++l) {
      const bool first_ntk = l == 0 && !kLevel.has_ntk, turn = kBackward && l + 1 == kConvs;
      Real s2[kOwn];
      for_each_patch(d, [&](int first, int y, int x) {
        for_each_in_patch(first, [&](int i, int r, int c) {
          s2[i] = contains(y + r, x + c, d) ? right_[kLevel.deviations + l * kPlane + shifted(y, x, r, c, d)] : Real(0);
        });
      });
      if (turn) leaving(d, n_bar, t_bar);
      exchange(l, d, v, t);
      for_each_patch(d, [&](int first, int y, int x) {
        for_each_in_patch(first, [&](int i, int r, int c) {
          const Real s1 = kWhole || contains(y + r, x + c) ? s1_[l][i] : Real(0), radial = s1 - s2[i], m = v[i] * kScale;
          const Real chord = larger(m - radial * radial, Real(0));  // sqrt(q1 q2) (1 - cosine): the distance without the difference in length
          const Real deviation = s1 * s2[i], n = 2 * deviation - chord, t_in = first_ntk || !kNtk ? n : t[i] * kScale + n;
          const Real inverse = deviation > 0 ? reciprocal(deviation) * Real(0.5 / kPi) : Real(0);
          const Angle<Real> a = angle<Real>(deviation > 0 ? chord * inverse : Real(1 / kPi), first_ntk);
          const Real sine_slope = deviation * a.sine, dot_slope = t_in * (a.dot_slope * inverse);
          if (turn) {
            pull_back(n_bar[i], t_bar[i], n, a.dot, dot_slope, sine_slope, n_bar[i], t_bar[i], sigma_[l][i]);
          } else {
            v[i] = kDistancesOut || l + 1 < kConvs ? m / 2 + (n * a.rest - sine_slope) : n * a.dot + sine_slope;
            t[i] = t_in * a.dot;
            if (kBackward) n_saved[l][i] = n, dot_saved[l][i] = a.dot, dot_slope_saved[l][i] = dot_slope, sine_slope_saved[l][i] = sine_slope;
          }
        });
      });
    }
    if constexpr (kBackward) {
#pragma unroll(kUnroll)
      for (int l = kConvs - 2; l >= 0; --l) {
        exchange_back(kNtk, d, n_bar, t_bar);
        for_each_patch(d, [&](int first, int y, int x) {
          for_each_in_patch(first, [&](int i, int r, int c) {
            pull_back(n_bar[i], t_bar[i], n_saved[l][i], dot_saved[l][i], dot_slope_saved[l][i], sine_slope_saved[l][i], n_bar[i], t_bar[i],
                      sigma_[l][i]);
          });
        });
      }
      if (kConvs) exchange_back(kHasNtk, d, n_bar, t_bar);
      entered(d, n_bar, t_bar);
    } else if constexpr (kLast) {
      Real n_part = 0, t_part = 0;
      for_each_patch(d, [&](int first, int y, int x) {
        for_each_in_patch(first, [&](int i, int r, int c) {
          if (contains(y + r, x + c, d)) n_part += v[i], t_part += t[i];
        });
      });
      n_sum += n_part, t_sum += t_part;
    } else {
      pool(d, v, t);
    }
  }

  // Cotangents of what entered the level: to the band, divided by 16 for the pooling below; at the first level to the pixels.
  void entered(Offset d, const Real (&n_bar)[kOwn], const Real (&t_bar)[kOwn]) {
    for_each_patch(d, [&](int first, int y, int x) {
      for_each_in_patch(first, [&](int i, int r, int c) {
        if (!contains(y + r, x + c, d)) return;
        if constexpr (p == 0) {
          for (int channel = 0; channel < kChannels; ++channel)
            pixel_bar_[channel][i] += n_bar[i] * Real(1.0 / kChannels) * right_[channel * kPlane + shifted(y, x, r, c, d)];
        } else {
          const int to = offset_index(d) * kPlane + at(kWidth, y + r, x + c);
          band_[to] = n_bar[i] / 16;
          if (kHasNtk) band_[offsets(kLevel) * kPlane + to] = t_bar[i] / 16;
        }
      });
    });
  }

  static constexpr int kPixelChannels = p == 0 ? kChannels : 1;

  const Real *const left_, *const right_;
  Real *const exchange_, *const band_, *const next_band_;
  int set_ = 0;
  Real n_bar_ = 0, t_bar_ = 0;
  Real x1_[kPixelChannels][kOwn], s1_[kLayers][kOwn], pixel_bar_[kPixelChannels][kOwn], sigma_[kLayers][kOwn];
};

}  // namespace kip
