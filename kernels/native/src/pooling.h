// 2x2 average pooling (VALID) in the offset layout: each (d, y) feeds exactly one (D, Y), per axis Y = y >> 1, D = ((y + d) >> 1) - Y.
#pragma once

#include "lines.h"

namespace kip {

// Where the rows of one offset of a level go in the next level's band.
class PoolingMap {
 public:
  PoolingMap(const Level& level, const Level& next, Offset d) : next_(next), dy_(d.dy), y_(std::max(0, -d.dy)) {
    const Rectangle r = level.rectangle(d);
    for (int parity = 0; parity < 2; ++parity) {
      Columns& c = columns_[parity];
      c.dx = (parity + d.dx) >> 1;
      if (std::abs(c.dx) > next.radius_x) continue;
      const int begin = (r.x + 1 - parity) >> 1;  // the first X with 2X + parity >= r.x
      const int end = std::min({next.width, next.width - c.dx, (r.x + r.width + 1 - parity) >> 1});
      c.count = std::max(0, end - begin);
      c.from = 2 * begin + parity - r.x;
      c.to = begin - std::max(0, -c.dx);
    }
  }

  // Whether row y of the rectangle is part of what the next level needs.
  bool wants(int y) const {
    const auto [Y, dy] = target(y);
    return Y < next_.height && Y + dy < next_.height && std::abs(dy) <= next_.radius_y;
  }

  // Calls f(i, j): entry i of row y is pooled into entry j of the band.
  template <class F>
  void for_each(int y, F f) const {
    const auto [Y, dy] = target(y);
    for (const Columns& c : columns_) {
      if (!c.count) continue;
      const Offset d{dy, c.dx};
      std::ptrdiff_t to = next_.start(d) + std::ptrdiff_t(Y - std::max(0, -dy)) * (next_.rectangle(d).width + 1) + c.to;
      for (int k = 0; k < c.count; ++k) f(c.from + 2 * k, to + k);
    }
  }

 private:
  struct Columns {  // those of one parity: every second entry of the row from `from`, consecutive ones of the band's row from `to`
    int dx = 0, count = 0, from = 0, to = 0;
  };
  struct Target {
    int Y, dy;
  };
  Target target(int y) const {
    const int Y = (y_ + y) >> 1;
    return {Y, ((y_ + y + dy_) >> 1) - Y};
  }

  const Level& next_;
  int dy_, y_;
  Columns columns_[2];
};

// Adds a level's output to the next level's band.
template <class V>
struct PoolingSink {
  PoolingMap map;
  Band<V> next;

  bool wants(int y) const { return map.wants(y); }
  void row(int y, const V* n, const V* t) {
    if (!wants(y)) return;
    constexpr auto share = Scalar<V>(1) / 16;
    map.for_each(y, [&](int i, std::ptrdiff_t j) {
      next.n[j] += n[i] * share;
      if (next.t) next.t[j] += t[i] * share;
    });
  }
};

// Reads the cotangents of a level's output from the next level's band.
template <class V>
struct PoolingSource {
  PoolingMap map;
  Band<V> next;
  int width;

  bool row(int y, V* n_bar, V* t_bar) {
    std::memset(n_bar, 0, width * sizeof(V));
    if (next.t) std::memset(t_bar, 0, width * sizeof(V));
    if (!map.wants(y)) return false;
    constexpr auto share = Scalar<V>(1) / 16;
    map.for_each(y, [&](int i, std::ptrdiff_t j) {
      n_bar[i] = next.n[j] * share;
      if (next.t) t_bar[i] = next.t[j] * share;
    });
    return true;
  }
};

// Sums the last level's output over all pixels and offsets: row by row, offset by offset (in float64), so that rounding stays small.
template <class V>
class ReadoutSink {
 public:
  explicit ReadoutSink(int width) : width_(width) {}

  bool wants(int) const { return true; }
  void row(int, const V* n, const V* t) {
    V n_row{}, t_row{};
    for (int x = 0; x < width_; ++x) n_row += n[x], t_row += t[x];
    n_ += n_row, t_ += t_row;
  }
  void add_to(double* n, double* t) const {
    for (int lane = 0; lane < kLanes<Scalar<V>>; ++lane) n[lane] += n_[lane], t[lane] += t_[lane];
  }

 private:
  int width_;
  V n_{}, t_{};
};

// The cotangent of a mean, the same for all entries.
template <class V>
struct ReadoutSource {
  V n_bar, t_bar;
  int width;

  bool row(int, V* n, V* t) {
    for (int x = 0; x < width; ++x) n[x] = n_bar, t[x] = t_bar;
    return true;
  }
};

}  // namespace kip
