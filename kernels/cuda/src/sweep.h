// One level of one pair of images: its offsets, one after the other, through the level's
// convolutions, forward and back. docs/kernel.md has the mathematics ("Offsets" to "The backward
// sweep"), and how threads share a plane ("One plane at a time").
namespace kip {

struct Offset {
  int dy, dx;
};

// Where a plane of a table or band has pixel (y, x): the even columns of a row, then the odd ones,
// so that neighbouring threads, which are two columns apart, touch neighbouring words.
constexpr int at(int width, int y, int x) {
  return (2 * y + (x & 1)) * ((width + 1) / 2) + (x >> 1);
}

constexpr int plane_size(int height, int width) { return 2 * height * ((width + 1) / 2); }

// double or Real, for sums of Real.
template <bool kIsDouble>
struct SumOf {
  using type = Real;
};
template <>
struct SumOf<true> {
  using type = double;
};

template <bool kSelf>
constexpr int level_count() {
  return kSelf ? kSelfCount : kPairCount;
}

template <bool kSelf>
constexpr Level level(int p) {
  return kSelf ? kSelfLevels[p] : kPairLevels[p];
}

// Level p. kSelf: of an image with itself, n alone, which fills the image's table with its
// variances.
template <bool kSelf, int p>
class Sweep {
 public:
  static constexpr Level kLevel = level<kSelf>(p);
  static constexpr bool kLast = p + 1 == level_count<kSelf>();
  static constexpr Level kNext = level<kSelf>(kLast ? p : p + 1);
  static constexpr bool kNtk = !kSelf, kHasNtk = kNtk && kLevel.has_ntk;  // whether t enters
  static constexpr bool kDistancesOut = kLast ? kHidden > 0 : kNext.distances;
  static constexpr bool kPositive = kBias > 1e-30;  // whether no variance can vanish

  // A plane, and where its neighbours' values are exchanged: with a ring of pixels around it.
  static constexpr int kHeight = kLevel.height, kWidth = kLevel.width, kConvs = kLevel.convs;
  static constexpr int kPlane = plane_size(kHeight, kWidth), kHalf = (kWidth + 1) / 2;
  static constexpr int kRows = kLevel.rows, kPatchRows = (kHeight + kRows - 1) / kRows;
  static constexpr int kStride = kLevel.stride, kExchange = (kPatchRows * kRows + 2) * 2 * kStride;
  static constexpr int kRing = 2 * (kHeight + kWidth) + 4;

  // Whether patches cover the plane exactly.
  static constexpr bool kWhole = kHeight % kRows == 0 && kWidth % 2 == 0;

  // Groups of threads, and what is a thread's: kTimes patches of kOwn pixels together, kRingTimes
  // places of the ring. kBusy: as many threads may have sums.
  static constexpr int kGroups = kLevel.groups, kMembers = kLevel.members;
  static constexpr int kPatches = kPatchRows * kHalf, kTimes = (kPatches + kMembers - 1) / kMembers;
  static constexpr int kOwn = kTimes * kRows * 2, kRingTimes = (kRing + kMembers - 1) / kMembers;
  static constexpr int kBusy = kGroups == 1 && kPatches < kThreads ? kPatches : kThreads;

  // Arrays over layers may not be empty; loops over them are unrolled where registers allow.
  static constexpr int kLayers = kConvs ? kConvs : 1;
  static constexpr int kUnroll = kOwn <= 16 && kConvs <= 4 ? kLayers : 1;

  // left, right: the images' tables. exchange: 6 planes a group [kExchange]. bands: the workspace.
  Sweep(const Real* left, const Real* right, Real* exchange, Real* bands)
      : left_(left),
        right_(right),
        exchange_(exchange),
        band_(bands + kLevel.band),
        next_band_(bands + kNext.band) {
    const bool is_member = kGroups * kMembers == kThreads || group() < kGroups;
    for (int k = 0; k < kTimes; ++k) {
      const int patch = member() + k * kMembers;
      const bool exists = is_member && (kPatches % kMembers == 0 || patch < kPatches);
      y_[k] = exists ? patch / kHalf * kRows : kNowhere, x_[k] = patch % kHalf * 2;
      own_[k] = exists ? at(kWidth, y_[k], x_[k]) : 0;
      place_[k] = exists ? position(y_[k], x_[k]) : 0;
    }
    for (int k = 0; k < kRingTimes; ++k) {
      const int e = member() + k * kMembers, side = e - 2 * (kWidth + 2);
      ring_y_[k] = !is_member || e >= kRing ? kNowhere
                   : side >= 0              ? side / 2
                   : e < kWidth + 2         ? -1
                                            : kHeight;
      ring_x_[k] = side >= 0 ? (side % 2 ? kWidth : -1) : e % (kWidth + 2) - 1;
    }
    sync();
    for (int e = thread(); e < kGroups * 6 * kExchange; e += kThreads) exchange_[e] = 0;
  }

  // Of the last level, this thread's part of the readout's sums: of n (or m) and t; of an image
  // with itself, of m and of the variances.
  double n_sum = 0, t_sum = 0;

  // Adds the level's output to the next band, which it clears first, or to the sums. Requires what
  // enters the level in its band (at level 0, tables have it).
  void forward() {
    clear_next();
    sync();
    load_own();
    for_each_offset([&](Offset d) { stream<false>(d); });
    sync();
    if constexpr (!kLast && kGroups > 1) {
      for (int e = thread(); e < kNextSize; e += kThreads)
        for (int g = 1; g < kGroups; ++g) next_band_[e] += next_band_[g * kNextSize + e];
      sync();
    }
  }

  // The adjoint, given the cotangents of the level's output in the next band (at the last level,
  // n_bar and t_bar for all entries). Those of what entered replace the band.
  void backward(Real n_bar, Real t_bar) {
    n_bar_ = n_bar, t_bar_ = t_bar;
    clear_own();
    sync();
    load_own();
    for_each_offset([&](Offset d) { stream<true>(d); });
    sync();
  }

  // After `backward`: stores the cotangents of the pixels (at the first level) and of the
  // deviations, each times the deviation, at their places in `derivatives` [kDerivatives].
  void store(Real* derivatives) {
    if constexpr (kGroups > 1) add_up_sigma();
    if (group()) return;
    for_each_pixel([&](int i, int y, int x) {
      if (p == 0)
        for (int c = 0; c < kChannels; ++c)
          derivatives[c * kPlane + at(kWidth, y, x)] = pixel_bar_[c][i];
      for (int l = 0; l < kConvs; ++l)
        derivatives[kLevel.sigma + l * kPlane + at(kWidth, y, x)] = sigma_[l][i];
    });
  }

  // After `backward_self`, at the first level: adds the pixels' cotangents, which that halved.
  void add_pixels(double* gradient) const {
    for_each_pixel([&](int i, int y, int x) {
      for (int c = 0; c < kChannels; ++c)
        gradient[c * kPlane + at(kWidth, y, x)] += 2 * double(pixel_bar_[c][i]);
    });
  }

  // As `forward`, of an image with itself; `table`, which is `left` and `right`, gets what the
  // level adds to it. diagonals: two planes [kDiagonal], which take turns from level to level.
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
        constexpr int below = level<kSelf>(p ? p - 1 : 0).width;
        const Real* from = diagonals + (p - 1) % 2 * kDiagonal;
        const Real spread = band_[offset_index({0, 0}) * kPlane + e];
        q[i] = (from[at(below, 2 * y, 2 * x)] + from[at(below, 2 * y, 2 * x + 1)] +
                (from[at(below, 2 * y + 1, 2 * x)] + from[at(below, 2 * y + 1, 2 * x + 1)])) *
                   Real(0.25) -
               spread;
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
      if (kLast) t_sum += q[i];
    });
    if (!kLast && !kDistancesOut) pool(view({0, 0}), q, q);
    sync();
    load_own();
    for_each_offset([&](Offset d) {
      if (d.dy || d.dx) stream<false>(d);
    });
    sync();
  }

  // The adjoint of `forward_self`, halved: through the left image alone. sums: the cotangents of
  // the table's deviations, each times the deviation, where `store` would put them.
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
    load_output_cotangents(view({0, 0}), q_bar, unused);
    for (int l = kConvs - 1; l >= 0; --l) {
      for_each_pixel([&](int i, int y, int x) {
        const Real q = 2 * s1_[l][i] * s1_[l][i];
        const Real outer =
            q > 0 ? Real(sums[kLevel.sigma + l * kPlane + at(kWidth, y, x)] / (2 * double(q)))
                  : Real(0);
        q_bar[i] = q_bar[i] / 2 + outer + (q > 0 ? sigma_[l][i] / q : Real(0));
      });
      convolve_plain(q_bar);
    }
    for_each_pixel([&](int i, int y, int x) {
      if (p > 0) band_[offset_index({0, 0}) * kPlane + at(kWidth, y, x)] = q_bar[i] / 16;
      if (p == 0)
        for (int c = 0; c < kChannels; ++c)
          pixel_bar_[c][i] +=
              q_bar[i] * left_[c * kPlane + at(kWidth, y, x)] * Real(1.0 / kChannels);
    });
    sync();
  }

 private:
  // Threads, patches and pixels.

  static int group() { return kGroups > 1 ? thread() / kMembers : 0; }
  static int member() { return kGroups > 1 ? thread() % kMembers : thread(); }

  // Calls f(d) for each offset of this thread's group. All groups make as many calls, since all
  // meet at barriers: one that has no offset left gets one without pixels.
  template <class F>
  static void for_each_offset(F f) {
    constexpr int columns = 2 * kLevel.radius_x + 1;
    if constexpr (kGroups > 1) {
      for (int first = 0; first < offsets(kLevel); first += kGroups) {
        const int index = first + group();
        f(index < offsets(kLevel)
              ? Offset{index / columns - kLevel.radius_y, index % columns - kLevel.radius_x}
              : Offset{kHeight, 0});
      }
    } else {
      for (int dy = -kLevel.radius_y; dy <= kLevel.radius_y; ++dy)
        for (int dx = -kLevel.radius_x; dx <= kLevel.radius_x; ++dx) f(Offset{dy, dx});
    }
  }

  // Calls f(k) for each patch of this thread.
  template <class F>
  static void for_each_patch(F f) {
#pragma unroll(kOwn <= 16 ? kTimes : 1)
    for (int k = 0; k < kTimes; ++k) f(k);
  }

  // Calls f(index, row, column) for the pixels of a patch.
  template <class F>
  static void for_each_in_patch(int k, F f) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < 2; ++c) f((k * kRows + r) * 2 + c, r, c);
  }

  // Calls f(index, y, x) for each pixel of this thread.
  template <class F>
  void for_each_pixel(F f) const {
    for_each_patch([&](int k) {
      for_each_in_patch(k, [&](int i, int r, int c) {
        if (contains(y_[k] + r, x_[k] + c)) f(i, y_[k] + r, x_[k] + c);
      });
    });
  }

  static bool contains(int y, int x) {
    return unsigned(y) < unsigned(kHeight) && unsigned(x) < unsigned(kWidth);
  }

  // The way, in a plane of a table or band, from a patch's first pixel to the one at (r, c).
  static constexpr int step(int r, int c) { return 2 * kHalf * r + kHalf * c; }

  static int offset_index(Offset d) {
    return (d.dy + kLevel.radius_y) * (2 * kLevel.radius_x + 1) + d.dx + kLevel.radius_x;
  }
  static constexpr int offsets(Level level) {
    return (2 * level.radius_y + 1) * (2 * level.radius_x + 1);
  }
  static constexpr int kNextT =
      (2 * kNext.radius_y + 1) * (2 * kNext.radius_x + 1) * plane_size(kNext.height, kNext.width);
  static constexpr int kNextSize =
      kNextT * (kNtk && kNext.has_ntk ? 2 : 1);  // of the next band, of n and then t

  // An offset, as this thread's pixels see it.
  struct View {
    Offset d;
    bool live[kTimes];     // whether a patch has a pixel y for which y + d exists
    bool valid[kOwn];      // whether a pixel is such a one
    int right[kTimes][2];  // where a plane of the second table has y + d (or something else), for
                           // the first pixel in each column of a patch
    int ring[kRingTimes];  // the same for the ring, -1 where there is none
  };

  View view(Offset d) const {
    View v;
    v.d = d;
    for_each_patch([&](int k) {
      const int y = y_[k] + d.dy, x = x_[k] + d.dx;
      v.live[k] = y > -kRows && y < kHeight && x > -2 && x < kWidth;
      for_each_in_patch(k, [&](int i, int r, int c) {
        v.valid[i] = contains(y + r, x + c) && (kWhole || contains(y_[k] + r, x_[k] + c));
      });
#pragma unroll
      for (int c = 0; c < 2; ++c)
        v.right[k][c] =
            own_[k] +
            (v.live[k] ? 2 * kHalf * d.dy + ((c + d.dx) & 1) * kHalf + ((c + d.dx) >> 1) : 0);
    });
    for (int k = 0; k < kRingTimes; ++k) {
      const int y = ring_y_[k] + d.dy, x = ring_x_[k] + d.dx;
      v.ring[k] = contains(y, x) ? at(kWidth, y, x) : -1;
    }
    return v;
  }

  // What is the first image's own.

  void load_own() {
    for (int i = 0; i < kOwn; ++i) {
      for (int l = 0; l < kLayers; ++l) s1_[l][i] = 1;
      for (int c = 0; c < kPixelChannels; ++c) x1_[c][i] = 0;
      halves_[i] = 0;
    }
    for_each_pixel([&](int i, int y, int x) {
      if (p == 0)
        for (int c = 0; c < kChannels; ++c) x1_[c][i] = left_[c * kPlane + at(kWidth, y, x)];
      for (int l = 0; l < kConvs; ++l)
        s1_[l][i] = left_[kLevel.deviations + l * kPlane + at(kWidth, y, x)];
      if (kLevel.distances) halves_[i] = left_[kLevel.halves + at(kWidth, y, x)];
    });
  }

  void clear_own() {
    for (int i = 0; i < kOwn; ++i) {
      for (int c = 0; c < kPixelChannels; ++c) pixel_bar_[c][i] = 0;
      for (int l = 0; l < kLayers; ++l) sigma_[l][i] = 0;
    }
  }

  void clear_next() {
    if constexpr (!kLast)
      for (int e = thread(); e < kGroups * kNextSize; e += kThreads) next_band_[e] = 0;
  }

  // Planes of neighbours.

  // This group's exchanged planes. which: the ring of 0 has ghosts, that of 1 and 2 zeros. Two sets
  // take turns, so that none need wait, to write one, for all to have read the other.
  Real* plane(int which, int group) const {
    return exchange_ + (6 * group + 3 * set_ + which) * kExchange;
  }
  Real* plane(int which) const { return plane(which, group()); }

  // Where an exchanged plane has pixel (y, x).
  static int position(int y, int x) { return (2 * (y + 1) + (x & 1)) * kStride + ((x + 1) >> 1); }

  // Replaces a patch's values by the 3x3 box sums of the exchanged plane; `place` is its first
  // pixel's.
  static void box(const Real* plane, int place, Real* own) {
    const Real* corner = plane + place - 2 * kStride;
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

  // Calls f(index, place in an exchanged plane) for each pixel of this thread.
  template <class F>
  void for_each_place(F f) const {
    for_each_patch([&](int k) {
      if ((kPatches % kMembers || kGroups * kMembers < kThreads) && y_[k] == kNowhere) return;
      for_each_in_patch(k, [&](int i, int r, int c) {
        if (kWhole || contains(y_[k] + r, x_[k] + c)) f(i, place_[k] + (2 * r + c) * kStride + c);
      });
    });
  }

  // Adds all groups' sigma to the first one's.
  void add_up_sigma() {
    for (int l = 0; l < kConvs; ++l) {
      for_each_place([&](int i, int place) { plane(0)[place] = sigma_[l][i]; });
      sync();
      if (!group())
        for_each_place([&](int i, int place) {
          for (int g = 1; g < kGroups; ++g) sigma_[l][i] += plane(0, g)[place];
        });
      set_ ^= 1;
    }
  }

  // A convolution, but for its bias, of variances or of their cotangents.
  void convolve_plain(Real (&q)[kOwn]) {
    Real* to = plane(1);
    for_each_place([&](int i, int place) { to[place] = q[i]; });
    sync();
    for_each_patch([&](int k) {
      box(to, place_[k], q + k * kRows * 2);
      for_each_in_patch(k, [&](int i, int, int) { q[i] *= kScale; });
    });
    set_ ^= 1;
  }

  // Replaces v and t, layer l's input, by their box sums with ghosts, and calls f(index) for each
  // pixel. A ghost is q / 2: a variance that enters the level is halved in the table, a later one
  // is twice the deviation's square, halved by the ReLU.
  template <class F>
  void exchange(int l, const View& view, Real (&v)[kOwn], Real (&t)[kOwn], F f) {
    const bool with_t = kNtk && (l || kLevel.has_ntk);
    Real *v_plane = plane(0), *t_plane = plane(1);
    for_each_place([&](int i, int place) {
      const Real s = l ? s1_[l ? l - 1 : 0][i] : Real(0);
      if (!view.valid[i]) v[i] = l ? s * s / 2 : halves_[i], t[i] = 0;
      v_plane[place] = v[i];
      if (with_t) t_plane[place] = t[i];
    });
    for (int k = 0; k < kRingTimes; ++k) {
      if (ring_y_[k] == kNowhere) continue;
      Real ghost = 0;
      if (view.ring[k] >= 0) {
        ghost = right_[(l ? kLevel.deviations + (l - 1) * kPlane : kLevel.halves) + view.ring[k]];
        if (l) ghost *= ghost / 2;
      }
      v_plane[position(ring_y_[k], ring_x_[k])] = ghost;
    }
    sync();
    for_each_patch([&](int k) {
      if (!view.live[k]) return;
      box(v_plane, place_[k], v + k * kRows * 2);
      if (with_t) box(t_plane, place_[k], t + k * kRows * 2);
      for_each_in_patch(k, [&](int i, int, int) { f(i); });
    });
    set_ ^= 1;
  }

  // Replaces n_bar (which has t_bar added) and t_bar, of a convolution's output, by those of its
  // input, with `scale` for its factor, and calls f(index) for each pixel.
  template <class F>
  void exchange_back(bool with_t, Real scale, const View& view, Real (&n_bar)[kOwn],
                     Real (&t_bar)[kOwn], F f) {
    Real *n_plane = plane(1), *t_plane = plane(2);
    for_each_place([&](int i, int place) {
      n_plane[place] = n_bar[i];
      if (with_t) t_plane[place] = t_bar[i];
    });
    sync();
    for_each_patch([&](int k) {
      if (!view.live[k]) return;
      box(n_plane, place_[k], n_bar + k * kRows * 2);
      if (with_t) box(t_plane, place_[k], t_bar + k * kRows * 2);
      for_each_in_patch(k, [&](int i, int, int) {
        n_bar[i] = view.valid[i] ? n_bar[i] * scale : Real(0);
        t_bar[i] = view.valid[i] ? t_bar[i] * scale : Real(0);
        f(i);
      });
    });
    set_ ^= 1;
  }

  // Pooling.

  // Whether an offset is odd along either axis: the way through a window is compiled for each case.
  template <bool y, bool x>
  struct Parity {
    static constexpr bool kOddY = y, kOddX = x;
  };

  template <class F>
  static void with_parity(Offset d, F f) {
    if (d.dy & 1)
      d.dx & 1 ? f(Parity<true, true>()) : f(Parity<true, false>());
    else
      d.dx & 1 ? f(Parity<false, true>()) : f(Parity<false, false>());
  }

  // Calls f(b, a, cell, is_wanted) for each part of the 2x2 window at (y, x): along an axis with an
  // odd offset, parts 0 and 1 are the even and the odd pixel, else part 0 is both. is_wanted:
  // whether the next level has the part; `cell`: where its band has it (or, within its margins,
  // something else).
  template <class P, class F>
  static void for_each_cell(P, int y, int x, Offset d, F f) {
    const int top = y >> 1, left = x >> 1, own = at(kNext.width, top, left);
#pragma unroll
    for (int b = 0; b <= P::kOddY; ++b) {
#pragma unroll
      for (int a = 0; a <= P::kOddX; ++a) {
        const int dy = (d.dy >> 1) + b, dx = (d.dx >> 1) + a;
        bool is_wanted = dy >= -kNext.radius_y && dy <= kNext.radius_y && dx >= -kNext.radius_x &&
                         dx <= kNext.radius_x;
        const int index = (dy + kNext.radius_y) * (2 * kNext.radius_x + 1) + dx + kNext.radius_x;
        // An odd last row or column, of either image, is dropped.
        if (kHeight % 2) is_wanted = is_wanted && top < kNext.height && top + dy < kNext.height;
        if (kWidth % 2) is_wanted = is_wanted && left < kNext.width && left + dx < kNext.width;
        f(b, a, index * plane_size(kNext.height, kNext.width) + own, is_wanted);
      }
    }
  }

  // The sum over part (b, a) of a 2x2 window of values.
  template <class P>
  static Real part(P, const Real* v, int b, int a) {
    const Real* row = v + 2 * b;
    const Real here = P::kOddX ? row[a] : row[0] + row[1];
    return P::kOddY ? here : here + (P::kOddX ? v[2 + a] : v[2] + v[3]);
  }

  // Pools v and t into the next band; they become 0 where they are not valid.
  void pool(const View& view, Real (&v)[kOwn], Real (&t)[kOwn]) const {
    for_each_patch([&](int k) {
      if (!view.live[k]) return;
      for_each_in_patch(k, [&](int i, int, int) {
        if (!view.valid[i]) v[i] = t[i] = 0;
      });
      with_parity(view.d, [&](auto parity) {
#pragma unroll
        for (int r = 0; r < kRows; r += 2) {
          const Real *n = v + (k * kRows + r) * 2, *ntk = t + (k * kRows + r) * 2;
          Real* const band = next_band_ + group() * kNextSize;
          Real before[2][2][2];  // all read before any is written: a single wait
          for_each_cell(parity, y_[k] + r, x_[k], view.d, [&](int b, int a, int cell, bool) {
            before[b][a][0] = band[cell];
            if (kNtk && kNext.has_ntk) before[b][a][1] = band[cell + kNextT];
          });
          for_each_cell(
              parity, y_[k] + r, x_[k], view.d, [&](int b, int a, int cell, bool is_wanted) {
                if (!is_wanted) return;
                band[cell] = before[b][a][0] + part(parity, n, b, a) * Real(1.0 / 16);
                if (kNtk && kNext.has_ntk)
                  band[cell + kNextT] = before[b][a][1] + part(parity, ntk, b, a) * Real(1.0 / 16);
              });
        }
      });
    });
  }

  // Sets the cotangents of the level's output, 0 where they are not valid.
  void load_output_cotangents(const View& view, Real (&n_bar)[kOwn], Real (&t_bar)[kOwn]) const {
    for (int i = 0; i < kOwn; ++i) n_bar[i] = t_bar[i] = 0;
    for_each_patch([&](int k) {
      if (!view.live[k]) return;
      if constexpr (kLast) {
        for_each_in_patch(k, [&](int i, int, int) { n_bar[i] = n_bar_, t_bar[i] = t_bar_; });
      } else {
        with_parity(view.d, [&](auto parity) {
          using P = decltype(parity);
#pragma unroll
          for (int r = 0; r < kRows; r += 2) {
            for_each_cell(parity, y_[k] + r, x_[k], view.d,
                          [&](int b, int a, int cell, bool is_wanted) {
                            Real n = next_band_[cell],
                                 ntk = kNtk && kNext.has_ntk ? next_band_[kNextT + cell] : Real(0);
                            if (!is_wanted) n = ntk = 0;
#pragma unroll
                            for (int row = 0; row < 2; ++row)
#pragma unroll
                              for (int column = 0; column < 2; ++column) {
                                const int i = (k * kRows + r + row) * 2 + column;
                                if ((!P::kOddY || row == b) && (!P::kOddX || column == a))
                                  n_bar[i] = n, t_bar[i] = ntk;
                              }
                          });
          }
        });
      }
      for_each_in_patch(k, [&](int i, int, int) {
        if (!view.valid[i]) n_bar[i] = t_bar[i] = 0;
      });
    });
  }

  // One offset.

  // Sets what enters the level: m (or n) and t.
  void load_input(const View& view, Real (&v)[kOwn], Real (&t)[kOwn]) const {
    for (int i = 0; i < kOwn; ++i) v[i] = t[i] = 0;
    for_each_patch([&](int k) {
      if (!view.live[k]) return;
      for_each_in_patch(k, [&](int i, int r, int c) {
        const Real* right = right_ + view.right[k][c] + 2 * kHalf * r;
        if constexpr (p == 0) {
          for (int channel = 0; channel < kChannels; ++channel) {
            const Real x2 = right[channel * kPlane], difference = x1_[channel][i] - x2;
            v[i] += kLevel.distances ? difference * difference : x1_[channel][i] * x2;
          }
          v[i] *= Real((kLevel.distances ? 0.5 : 1.0) / kChannels);
        } else if (kWhole || view.valid[i]) {
          const Real* from = band_ + offset_index(view.d) * kPlane + own_[k] + step(r, c);
          v[i] = from[0];
          if (kHasNtk) t[i] = from[offsets(kLevel) * kPlane];
          if (kLevel.distances) {
            const Real spreads = left_[kLevel.halves + kPlane + own_[k] + step(r, c)] +
                                 right[kLevel.halves + kPlane];
            const Real variances = halves_[i] + right[kLevel.halves];
            v[i] -= spreads;
            constexpr Real rounding2 = kRounding<Real> * kRounding<Real> / 4;
            if (v[i] < 0 || v[i] * v[i] < rounding2 * spreads * (spreads + variances)) v[i] = 0;
          }
        }
      });
    });
  }

  // One offset through the level, and, if kBackward, back.
  template <bool kBackward>
  void stream(Offset d) {
    const View view = this->view(d);
    Real v[kOwn], t[kOwn], n_bar[kOwn], t_bar[kOwn];
    Real n_saved[kLayers][kOwn], dot_saved[kLayers][kOwn], dot_slope_saved[kLayers][kOwn],
        sine_slope_saved[kLayers][kOwn];
    load_input(view, v, t);
    if (kBackward && !kConvs) load_output_cotangents(view, n_bar, t_bar);
#pragma unroll(kUnroll)
    for (int l = 0; l < kConvs; ++l) {
      const bool first_ntk = l == 0 && !kLevel.has_ntk, turn = kBackward && l + 1 == kConvs;
      Real s2[kOwn];
      for_each_patch([&](int k) {
        if (!view.live[k]) return;
        for_each_in_patch(k, [&](int i, int r, int c) {
          const Real s = right_[view.right[k][c] + kLevel.deviations + l * kPlane + 2 * kHalf * r];
          s2[i] = view.valid[i] ? s : Real(1);
        });
      });
      if (turn) load_output_cotangents(view, n_bar, t_bar);
      exchange(l, view, v, t, [&](int i) {
        const Real s1 = s1_[l][i], radial = s1 - s2[i], m = v[i] * kScale;
        // sqrt(q1 q2) (1 - cosine).
        Real chord = larger(m - radial * radial, Real(0));
        const Real deviation = s1 * s2[i];
        if (!kPositive) {
          constexpr Real rounding2 = kRounding<Real> * kRounding<Real> / 4;
          if (chord * chord <= rounding2 * m * (m + 2 * deviation)) chord = 0;
        }
        // Where lengths are far apart, the rounding of m exceeds what cosines allow; and where
        // there are no pixels, what is not used must be a number, too.
        chord = smaller(chord, deviation * (first_ntk ? 4 : 2));
        const Real n = 2 * deviation - chord, t_in = first_ntk || !kNtk ? n : t[i] * kScale + n;
        const bool positive = kPositive || deviation > 0;
        const Real inverse = positive ? reciprocal(deviation) * Real(0.5 / kPi) : Real(0);
        const Angle<Real> a = angle<Real>(positive ? chord * inverse : Real(1 / kPi), first_ntk);
        const Real sine_slope = deviation * a.sine, dot_slope = t_in * (a.slope * inverse);
        if (turn) {
          relu_vjp(n_bar[i], t_bar[i], n, a.dot, dot_slope, sine_slope, n_bar[i], t_bar[i],
                   sigma_[l][i]);
        } else {
          v[i] = kDistancesOut || l + 1 < kConvs ? m / 2 + (n * a.rest - sine_slope)
                                                 : n * a.dot + sine_slope;
          t[i] = t_in * a.dot;
          if (kBackward) {
            n_saved[l][i] = n, dot_saved[l][i] = a.dot;
            dot_slope_saved[l][i] = dot_slope, sine_slope_saved[l][i] = sine_slope;
          }
        }
      });
    }
    if constexpr (kBackward) {
#pragma unroll(kUnroll)
      for (int l = kConvs - 2; l >= 0; --l) {
        exchange_back(kNtk, kScale, view, n_bar, t_bar, [&](int i) {
          relu_vjp(n_bar[i], t_bar[i], n_saved[l][i], dot_saved[l][i], dot_slope_saved[l][i],
                   sine_slope_saved[l][i], n_bar[i], t_bar[i], sigma_[l][i]);
        });
      }
      // The pooling below shares out sixteenths; the input is a mean over channels.
      constexpr double share = p ? 1.0 / 16 : 1.0 / kChannels;
      if (kConvs) exchange_back(kHasNtk, Real(kWeight / 9 * share), view, n_bar, t_bar, [](int) {});
      store_input_cotangents(view, Real(kConvs ? 1 : share), n_bar, t_bar);
    } else if constexpr (kLast) {
      typename SumOf<(kHidden > 0)>::type n_part = 0;  // hidden layers subtract spreads
      Real t_part = 0;
      for (int i = 0; i < kOwn; ++i)
        if (view.valid[i]) n_part += v[i], t_part += t[i];
      n_sum += n_part;
      if (kNtk) t_sum += t_part;
    } else {
      pool(view, v, t);
    }
  }

  // Stores the cotangents of what entered the level, times `share`, in its band; at the first level
  // adds those of the pixels.
  void store_input_cotangents(const View& view, Real share, const Real (&n_bar)[kOwn],
                              const Real (&t_bar)[kOwn]) {
    for_each_patch([&](int k) {
      if (!view.live[k]) return;
      for_each_in_patch(k, [&](int i, int r, int c) {
        if constexpr (p == 0) {
          for (int channel = 0; channel < kChannels; ++channel)
            pixel_bar_[channel][i] +=
                n_bar[i] * share * right_[view.right[k][c] + channel * kPlane + 2 * kHalf * r];
        } else if (view.valid[i]) {
          Real* to = band_ + offset_index(view.d) * kPlane + own_[k] + step(r, c);
          to[0] = n_bar[i] * share;
          if (kHasNtk) to[offsets(kLevel) * kPlane] = t_bar[i] * share;
        }
      });
    });
  }

  static constexpr int kPixelChannels = p == 0 ? kChannels : 1;
  static constexpr int kNowhere = 1 << 20;

  const Real *const left_, *const right_;
  Real *const exchange_, *const band_, *const next_band_;
  int y_[kTimes], x_[kTimes];  // the first pixels of this thread's patches
  int own_[kTimes],
      place_[kTimes];  // where they are in a plane of a table or band, and in an exchanged one
  int ring_y_[kRingTimes], ring_x_[kRingTimes];  // this thread's places around the plane
  int set_ = 0;
  Real n_bar_ = 0, t_bar_ = 0;
  Real x1_[kPixelChannels][kOwn], s1_[kLayers][kOwn], halves_[kOwn],
      pixel_bar_[kPixelChannels][kOwn], sigma_[kLayers][kOwn];
};

}  // namespace kip
