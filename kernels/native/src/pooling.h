// Between levels: 2x2 average pooling, and the readout.
#pragma once

#include <vector>

#include "lines.h"

namespace kip {

// 2x2 average pooling (VALID) of one offset: each (d, y) feeds exactly one (D, Y), per axis Y = y
// >> 1, D = ((y + d) >> 1) - Y. Row by row the cells of the next level's band that a row feeds, or
// takes its cotangents from. What the next level does not need goes to `spare`.
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

// The sum of the last level's output over all pixels and offsets: column by column, offset by
// offset (in float64), so that rounding stays small; and the cotangent of such a sum, the same for
// all entries.
template <class V>
class Readout {
 public:
  static constexpr auto share = Scalar<V>(1);
  bool distances() const { return distances_; }

  Readout(int max_width, bool distances)
      : half_((max_width + 1) / 2), columns_(4 * half_), distances_(distances) {}

  void clear() { columns_.clear(); }
  void begin(int width) { width_ = width; }
  Cells<V> row(int) {
    V* first = columns_.data();
    return {{first, first + half_}, {first + 2 * half_, first + 3 * half_}, width_};
  }

  // Adds the sum over the columns to n and t [lanes], and forgets it.
  void flush(double* n, double* t) {
    for (int i = 0; i < 4 * half_; ++i)
      for (int lane = 0; lane < kLanes<Scalar<V>>; ++lane)
        (i < 2 * half_ ? n : t)[lane] += columns_[i][lane];
    columns_.clear();
  }

  void set_cotangents(V n_bar, V t_bar) {
    for (int i = 0; i < 4 * half_; ++i) columns_[i] = i < 2 * half_ ? n_bar : t_bar;
  }

 private:
  int half_, width_ = 0;
  Buffer<V> columns_;
  bool distances_;
};

}  // namespace kip
