// The levels in sequence, forward and back, of a left image with a tile of `kLanes` right ones, and
// of a tile of images each with itself.
#pragma once

#include <vector>

#include "head.h"
#include "pooling.h"

namespace kip {

// What lies between the levels: the band that enters each one, and the readout after the last.
template <class V>
class Bands {
 public:
  // ntk: whether there is t, too.
  Bands(const Plan& plan, bool ntk)
      : readout(plan.max_width, plan.distances_to_readout()), plan_(plan), spare_(plan.max_width) {
    for (std::size_t p = 0; p < plan.levels.size(); ++p) {
      n_.emplace_back(p ? plan.levels[p].size : 0);
      t_.emplace_back(p && ntk ? plan.levels[p].size : 0);
    }
  }

  // What enters level p; nulls at level 0.
  Band<V> entering(int p) { return {n_[p].data(), t_[p].data()}; }

  // Calls f(d, to) for each offset of level p, `to` being where its output goes, which it clears
  // first.
  template <class F>
  void for_each_output(int p, F f) {
    if (is_last(p))
      readout.clear();
    else
      n_[p + 1].clear(), t_[p + 1].clear();
    plan_.levels[p].for_each_offset([&](Offset d) {
      with_output(p, d, [&](auto& to) { f(d, to); });
      if (is_last(p)) readout.end();
    });
  }

  // Calls f(from) with the cells of the cotangents of level p's output at offset d, given those of
  // the readout.
  template <class F>
  void with_output(int p, Offset d, F f) {
    const Level& level = plan_.levels[p];
    if (is_last(p)) {
      readout.begin(level.rectangle(d).width);
      f(readout);
    } else {
      PoolingCells<V> cells(level, plan_.levels[p + 1], d, entering(p + 1), spare_.data());
      f(cells);
    }
  }

  // To be called between forward and backward: what is not needed has no cotangent.
  void clear_spare() { spare_.clear(); }

  Readout<V> readout;

 private:
  bool is_last(std::size_t p) const { return p + 1 == plan_.levels.size(); }

  const Plan& plan_;
  std::vector<Buffer<V>> n_, t_;
  Buffer<V> spare_;
};

// One left image against a tile of right images. Each thread needs its own.
template <class T>
class PairEngine {
 public:
  using V = Vector<T>;

  // plan: of pairs.
  explicit PairEngine(const Plan& plan)
      : plan_(plan),
        lines_(plan),
        bands_(plan, true),
        head_(plan),
        pixel_bar_(plan.image_size()),
        sigma_(plan.variances) {}

  // The kernel of the left image with each right one.
  V forward(Image<T> left, Image<V> right) {
    lines_.set_images(left, right);
    for (int p = 0; p < levels(); ++p)
      bands_.for_each_output(
          p, [&](Offset d, auto& to) { lines_.forward(p, d, bands_.entering(p), to); });
    const double share = plan_.readout_share();
    Lanes<T> n = Lanes<T>::from([&](int lane) { return bands_.readout.n_sum[lane] * share; });
    if (plan_.distances_to_readout()) n = head_.covariance(left.head, right.head, n);
    const auto t = Lanes<T>::from([&](int lane) { return bands_.readout.t_sum[lane] * share; });
    return head_.forward(left.head, right.head, n, t).narrowed();
  }

  // Requires `forward` of the same images just before. Sets `pixel_bar` [H, W, D], the derivatives
  // of the kernel by the left image's pixels, and `sigma` [variances], those by its deviations,
  // each times the deviation.
  void backward(Image<T> left, Image<V> right) {
    pixel_bar_.clear();
    sigma_.clear();
    Lanes<T> n_bar, t_bar;
    head_.backward(n_bar, t_bar, [&](int l, const Lanes<T>& sigma) {
      sigma_[plan_.convolution_variances() + l] = sigma.narrowed();
    });
    bands_.readout.set_cotangents(n_bar.narrowed() * T(plan_.readout_share()),
                                  t_bar.narrowed() * T(plan_.readout_share()));
    bands_.clear_spare();
    lines_.set_images(left, right);
    for (int p = levels() - 1; p >= 0; --p)
      plan_.levels[p].for_each_offset([&](Offset d) {
        bands_.with_output(p, d, [&](auto& from) {
          lines_.backward(p, d, bands_.entering(p), from, pixel_bar_.data(), sigma_.data());
        });
      });
  }

  const Buffer<V>& pixel_bar() const { return pixel_bar_; }
  const Buffer<V>& sigma() const { return sigma_; }

 private:
  int levels() const { return static_cast<int>(plan_.levels.size()); }

  const Plan& plan_;
  Lines<T, T, true> lines_;
  Bands<V> bands_;
  Head<T> head_;
  Buffer<V> pixel_bar_, sigma_;
};

// As many images as there are lanes, each with itself, for its variances: docs/kernel.md,
// "Variances". Each thread needs its own.
template <class T>
class VarianceEngine {
 public:
  using V = Vector<T>;

  // plan: of single images.
  explicit VarianceEngine(const Plan& plan)
      : plan_(plan),
        lines_(plan),
        bands_(plan, false),
        table_(plan.table()),
        inverse_(plan.convolution_variances()),
        deviation_(plan.convolution_variances()),
        pixel_bar_(plan.image_size()),
        sigma_(plan.variances),
        zeros_(plan.max_width + 1),
        plane_(plan.pixels * 2),
        next_plane_(plan.pixels * 2) {}

  // The tables [table] of images [H, W, D]: the variance of each convolution's ReLU's input, and
  // the pooled values. Where there are hidden layers, sets the variance and the spread of what the
  // readout reads.
  const Buffer<V>& forward(const V* pixels, Lanes<T>& variance, Lanes<T>& spread) {
    images_ = {pixels, inverse_.data(), deviation_.data(),
               table_.data() + plan_.convolution_variances(), nullptr};
    lines_.set_images(images_, images_);
    for (int p = 0; p < levels(); ++p) {
      forward_diagonal(p);
      if (p + 1 < levels() || plan_.network.hidden)
        bands_.for_each_output(p, [&](Offset d, auto& to) {
          if (d.dy || d.dx)
            lines_.forward(p, d, bands_.entering(p), to);
          else if (!to.distances())  // else 0
            add_diagonal(p, to);
        });
    }
    if (plan_.network.hidden) {  // as after a pooling
      const auto& sum = bands_.readout.n_sum;
      spread = Lanes<T>::from([&](int lane) { return sum[lane] * plan_.readout_share(); });
      variance = mean_diagonal();
      for (int k = 0; k < kParts<T>; ++k) variance.part[k] -= spread.part[k];
    }
    return table_;
  }

  // Requires `forward` of the same images just before. The gradient [H, W, D] by the pixels,
  // halved, of a function whose gradient by the variances is q_bar [variances].
  const Buffer<V>& backward(const V* q_bar) {
    pixel_bar_.clear();
    sigma_.clear();
    V n_bar{};
    for (Index e = plan_.variances; e-- > plan_.convolution_variances();)
      n_bar = (q_bar[e] + n_bar * T(0.5)) * T(plan_.network.w);
    bands_.readout.set_cotangents(plan_.network.hidden ? n_bar * T(plan_.readout_share()) : n_bar,
                                  V{});
    bands_.clear_spare();
    for (int p = levels() - 1; p >= 0; --p) {
      plan_.levels[p].for_each_offset([&](Offset d) {
        if (d.dy || d.dx)
          bands_.with_output(p, d, [&](auto& from) {
            lines_.backward(p, d, bands_.entering(p), from, pixel_bar_.data(), sigma_.data());
          });
      });
      // Offset 0 is last: it takes what all others add to sigma.
      bands_.with_output(p, {0, 0}, [&](auto& from) { backward_diagonal(p, from, q_bar); });
    }
    return pixel_bar_;
  }

 private:
  int levels() const { return static_cast<int>(plan_.levels.size()); }

  static V* plane_row(Buffer<V>& plane, const Level& level, int y) {
    return plane.data() + y * (level.width + 1);
  }

  // Rows y - 1, y and y + 1 of plane_.
  ThreeRows<V> three(const Level& level, int y) {
    return {y ? plane_row(plane_, level, y - 1) : zeros_.data(), plane_row(plane_, level, y),
            y + 1 < level.height ? plane_row(plane_, level, y + 1) : zeros_.data()};
  }

  // Adds the variances in plane_, which are n at offset 0, to level p's output.
  template <class To>
  void add_diagonal(int p, To& to) {
    for (int y = 0; y < plan_.levels[p].height; ++y) {
      const AddToCells<V, false> out{to.row(y), to.share};
      const V* row = plane_row(plane_, plan_.levels[p], y);
      for (int x = 0; x < out.cells.count; ++x) out.template emit<false>(x, 2 * row[x], V{});
    }
  }

  // The mean of plane_ at the last level.
  Lanes<T> mean_diagonal() const {
    const Level& level = plan_.levels.back();
    double sum[kLanes<T>] = {};
    for (int y = 0; y < level.height; ++y)
      for (int x = 0; x < level.width; ++x)
        for (int lane = 0; lane < kLanes<T>; ++lane)
          sum[lane] += plane_[y * (level.width + 1) + x][lane];
    return Lanes<T>::from([&](int lane) { return sum[lane] / level.pixels(); });
  }

  // Level p at offset 0, where the cosine is 1: the variances themselves, which go to the tables.
  // Takes the output of the level before from plane_, and leaves its own there.
  void forward_diagonal(int p) {
    const Level& level = plan_.levels[p];
    const T scale = T(plan_.convolution_scale()), bias = T(plan_.network.b);
    const int width = level.width;
    if (p && level.distances) {
      pool_diagonal(p);
    } else {
      for (int y = 0; y < level.height; ++y) {
        V* row = plane_row(plane_, level, y);
        if (p)
          std::memcpy(row, bands_.entering(p).n + level.start({0, 0}) + y * (width + 1),
                      width * sizeof(V));
        else
          input_row<0, false>(images_.pixels + Index(y) * width * plan_.channels,
                              images_.pixels + Index(y) * width * plan_.channels, width,
                              plan_.channels, row);
        for (int x = 0; x < width; ++x) row[x] *= T(0.5);
      }
    }
    for (int y = 0; y < level.height; ++y)
      plane_row(plane_, level, y)[width] = plane_row(next_plane_, level, y)[width] = V{};
    for (int l = 0; l < level.convs; ++l) {
      for (int y = 0; y < level.height; ++y) {
        V* out = plane_row(next_plane_, level, y);
        const Index first = level.first_variance + Index(l * level.height + y) * width;
        for_each_box(three(level, y), width, [&](int x, V box) {
          const V q = box * scale + bias;
          table_[first + x] = q;
          inverse_[first + x] = q > V{} ? 1 / square_root(q * T(kPi)) : V{};
          deviation_[first + x] = square_root(q * T(0.5));
          out[x] = q * T(0.5);
        });
      }
      std::swap(plane_, next_plane_);
    }
  }

  // Pools the variances in plane_ into level p: their means less the spreads, which the band holds
  // at offset 0.
  void pool_diagonal(int p) {
    const Level &level = plan_.levels[p], &below = plan_.levels[p - 1];
    V* pooled = table_.data() + plan_.convolution_variances() + level.first_pooled;
    for (int y = 0; y < level.height; ++y) {
      const V *even = plane_row(plane_, below, 2 * y), *odd = plane_row(plane_, below, 2 * y + 1);
      const V* m = bands_.entering(p).n + level.start({0, 0}) + y * (level.width + 1);
      V* out = plane_row(next_plane_, level, y);
      for (int x = 0; x < level.width; ++x) {
        const V spread = m[x] * T(0.5);
        out[x] = (even[2 * x] + even[2 * x + 1] + (odd[2 * x] + odd[2 * x + 1])) * T(0.25) - spread;
        pooled[y * level.width + x] = spread;
        pooled[level.pixels() + y * level.width + x] = out[x];
      }
    }
    std::swap(plane_, next_plane_);
  }

  // The adjoint of `forward_diagonal`, given the cotangents of the level's output in `from`, of the
  // tables in q_bar, and of deviations, from all other offsets, in sigma_.
  template <class From>
  void backward_diagonal(int p, From& from, const V* q_bar) {
    const Level& level = plan_.levels[p];
    const T scale = T(plan_.convolution_scale());
    const int width = level.width, channels = plan_.channels;
    for (int y = 0; y < level.height; ++y) {
      V* row = plane_row(plane_, level, y);
      const Cells<V> cells = from.row(y);
      for (int x = 0; x < width; ++x) row[x] = x < cells.count ? 2 * cells.n[x & 1][x >> 1] : V{};
      row[width] = plane_row(next_plane_, level, y)[width] = V{};
    }
    for (int l = level.convs - 1; l >= 0; --l) {
      const Index first = level.first_variance + Index(l) * level.pixels();
      for (int y = 0; y < level.height; ++y) {
        V* row = plane_row(plane_, level, y);
        for (int x = 0; x < width; ++x) {
          const Index e = first + y * width + x;
          row[x] = row[x] * T(0.5) + q_bar[e] + sigma_[e] * inverse_[e] * inverse_[e] * T(kPi);
        }
      }
      for (int y = 0; y < level.height; ++y)
        scaled_box_row(three(level, y), width, scale, plane_row(next_plane_, level, y));
      std::swap(plane_, next_plane_);
    }
    for (int y = 0; y < level.height; ++y) {
      const V* row = plane_row(plane_, level, y);
      const Index first = Index(y) * width * channels;
      if (p) {
        for (int x = 0; x < width; ++x)
          bands_.entering(p).n[level.start({0, 0}) + y * (width + 1) + x] = row[x] / 32;
      } else {
        for (int e = 0; e < width * channels; ++e)
          pixel_bar_[first + e] += row[e / channels] * images_.pixels[first + e] / T(channels);
      }
    }
  }

  const Plan& plan_;
  Lines<T, V, false> lines_;
  Bands<V> bands_;
  Image<V> images_{};
  Buffer<V> table_, inverse_, deviation_, pixel_bar_, sigma_, zeros_;
  Buffer<V> plane_, next_plane_;  // variances at offset 0, or their cotangents: rows of width + 1
};

}  // namespace kip
