// Where a level's output goes: the next level's band, by 2x2 average pooling, or the readout.
#pragma once

#include <algorithm>

#include "lines.h"

namespace kip {

// 2x2 average pooling of one offset d of a level into the band of the next one: docs/kernel.md,
// "Pooling and averages". `row(y)` gives the cells that row y of the rectangle feeds, or takes its
// cotangents from. What the next level does not need goes to `spare` [width].
template <class V>
class PoolingCells {
 public:
  static constexpr auto share = Scalar<V>(1) / 16;
  bool distances() const { return next_.distances; }

  PoolingCells(const Level& level, const Level& next, Offset d, Band<V> band, V* spare)
      : next_(next), band_(band), spare_(spare), d_(d), rect_(level.rectangle(d)) {
    const int last = rect_.x + rect_.width - 1;  // an odd last column, of either image, is dropped
    count_ = rect_.width - ((last >> 1) >= next.width || ((last + d.dx) >> 1) >= next.width);
  }

  Cells<V> row(int y) const {
    const int y1 = rect_.y + y, Y = y1 >> 1, dy = ((y1 + d_.dy) >> 1) - Y;
    Cells<V> cells{{spare_, spare_}, {spare_, spare_}, 0};
    if (Y >= next_.height || Y + dy >= next_.height || std::abs(dy) > next_.radius_y) return cells;
    cells.count = count_;
    for (int parity = 0; parity < 2; ++parity) {
      const int x1 = rect_.x + parity, X = x1 >> 1, dx = ((x1 + d_.dx) >> 1) - X;
      if (std::abs(dx) > next_.radius_x) continue;
      const Rectangle to = next_.rectangle({dy, dx});
      const Index cell = next_.start({dy, dx}) + Index(Y - to.y) * (to.width + 1) + X - to.x;
      cells.n[parity] = band_.n + cell;
      if (band_.t) cells.t[parity] = band_.t + cell;
    }
    return cells;
  }

 private:
  const Level& next_;
  Band<V> band_;
  V* spare_;
  Offset d_;
  Rectangle rect_;
  int count_;
};

// The readout's sum of the last level's output over all pixels and offsets: by column within an
// offset, then in float64, so that rounding stays small. In the backward sweep, the cotangent of
// that sum, which is the same for all entries. As cells of Lines, see PoolingCells.
template <class V>
class Readout {
 public:
  static constexpr auto share = Scalar<V>(1);
  bool distances() const { return distances_; }

  // distances: whether 2 m is summed, not 2 n.
  Readout(int max_width, bool distances)
      : half_((max_width + 1) / 2), columns_(4 * half_), distances_(distances) {}

  void clear() {
    columns_.clear();
    std::fill_n(n_sum, kLanes<Scalar<V>>, 0.0);
    std::fill_n(t_sum, kLanes<Scalar<V>>, 0.0);
  }

  // Begins an offset whose rectangle is `width` wide.
  void begin(int width) { width_ = width; }

  Cells<V> row(int) {
    V* first = columns_.data();
    return {{first, first + half_}, {first + 2 * half_, first + 3 * half_}, width_};
  }

  // Ends an offset: adds its columns to the sums.
  void end() {
    for (int i = 0; i < 4 * half_; ++i)
      for (int lane = 0; lane < kLanes<Scalar<V>>; ++lane)
        (i < 2 * half_ ? n_sum : t_sum)[lane] += columns_[i][lane];
    columns_.clear();
  }

  void set_cotangents(V n_bar, V t_bar) {
    for (int i = 0; i < 4 * half_; ++i) columns_[i] = i < 2 * half_ ? n_bar : t_bar;
  }

  double n_sum[kLanes<Scalar<V>>] = {}, t_sum[kLanes<Scalar<V>>] = {};

 private:
  int half_, width_ = 0;
  Buffer<V> columns_;
  bool distances_;
};

}  // namespace kip
