// The kernel of pairs of images, and the variances of single ones, with their gradients, for
// `kLanes` right images at a time.
#pragma once

#include <vector>

#include "head.h"
#include "pooling.h"

namespace kip {

template <class V>
struct BandBuffers {
  BandBuffers(const Plan& plan, bool ntk) {
    for (std::size_t p = 0; p < plan.levels.size(); ++p) {
      n.emplace_back(p ? plan.levels[p].size : 0);
      t.emplace_back(p && ntk ? plan.levels[p].size : 0);
    }
  }
  Band<V> band(std::size_t p) { return {n[p].data(), t[p].data()}; }
  void clear(std::size_t p) { n[p].clear(), t[p].clear(); }

  std::vector<Buffer<V>> n, t;
};

// One left image against a tile of right images. One per thread.
template <class T>
class PairEngine {
 public:
  using V = Vector<T>;

  explicit PairEngine(const Plan& plan)
      : plan_(plan),
        lines_(plan),
        bands_(plan, true),
        head_(plan),
        readout_(plan.max_width, plan.distances_to_readout()),
        pixel_bar_(plan.image_size()),
        sigma_(plan.variances),
        spare_(plan.max_width) {}

  // The kernel of the left image and each right image.
  V forward(Image<T> left, Image<V> right) {
    lines_.set_images(left, right);
    readout_.clear();
    double n_sum[kLanes<T>] = {}, t_sum[kLanes<T>] = {};
    for (int p = 0; p < levels(); ++p) {
      const Level& level = plan_.levels[p];
      if (p + 1 < levels()) {
        bands_.clear(p + 1);
        level.for_each_offset([&](Offset d) {
          PoolingCells<V> to(level, plan_.levels[p + 1], d, bands_.band(p + 1), spare_.data());
          lines_.forward(p, d, bands_.band(p), to);
        });
      } else {
        level.for_each_offset([&](Offset d) {
          readout_.begin(level.rectangle(d).width);
          lines_.forward(p, d, bands_.band(p), readout_);
          readout_.flush(n_sum, t_sum);
        });
      }
    }
    const double share = plan_.readout_share();
    Lanes<T> n = Lanes<T>::from([&](int lane) { return n_sum[lane] * share; });
    if (plan_.distances_to_readout()) n = head_.covariance(left.head, right.head, n);
    return head_
        .forward(left.head, right.head, n,
                 Lanes<T>::from([&](int lane) { return t_sum[lane] * share; }))
        .narrowed();
  }

  // After `forward`: sets the derivatives of the kernel by the left image's pixels, and by its
  // deviations (each times the deviation).
  void backward(Image<T> left, Image<V> right) {
    pixel_bar_.clear();
    sigma_.clear();
    Lanes<T> n_bar, t_bar;
    head_.backward(n_bar, t_bar, [&](int l, const Lanes<T>& sigma) {
      sigma_[plan_.convolution_variances() + l] = sigma.narrowed();
    });
    readout_.set_cotangents(n_bar.narrowed() * T(plan_.readout_share()),
                            t_bar.narrowed() * T(plan_.readout_share()));
    spare_.clear();
    lines_.set_images(left, right);
    for (int p = levels() - 1; p >= 0; --p) {
      const Level& level = plan_.levels[p];
      level.for_each_offset([&](Offset d) {
        if (p + 1 < levels()) {
          PoolingCells<V> from(level, plan_.levels[p + 1], d, bands_.band(p + 1), spare_.data());
          lines_.backward(p, d, bands_.band(p), from, pixel_bar_.data(), sigma_.data());
        } else {
          readout_.begin(level.rectangle(d).width);
          lines_.backward(p, d, bands_.band(p), readout_, pixel_bar_.data(), sigma_.data());
        }
      });
    }
  }

  const Buffer<V>& pixel_bar() const { return pixel_bar_; }
  const Buffer<V>& sigma() const { return sigma_; }

 private:
  int levels() const { return static_cast<int>(plan_.levels.size()); }

  const Plan& plan_;
  Lines<T, T, true> lines_;
  BandBuffers<V> bands_;
  Head<T> head_;
  Readout<V> readout_;
  Buffer<V> pixel_bar_, sigma_, spare_;
};

// As many images as there are lanes, each with itself. The pair (x, x) is symmetric under (d, y) ->
// (-d, y + d), so that all gradients are twice those through its left image.
template <class T>
class VarianceEngine {
 public:
  using V = Vector<T>;

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
        spare_(plan.max_width),
        plane_(plan.pixels * 2),
        next_plane_(plan.pixels * 2),
        readout_(plan.max_width, plan.distances_to_readout()) {}

  // The tables of images [H, W, D]: the variance of each convolution's ReLU's input, and the pooled
  // values. Where there are hidden layers, sets the variance and the spread of what the readout
  // reads.
  const Buffer<V>& forward(const V* pixels, Lanes<T>& variance, Lanes<T>& spread) {
    images_ = {pixels, inverse_.data(), deviation_.data(),
               table_.data() + plan_.convolution_variances(), nullptr};
    lines_.set_images(images_, images_);
    readout_.clear();
    double sum[kLanes<T>] = {}, unused[kLanes<T>] = {};
    for (int p = 0; p < levels(); ++p) {
      const Level& level = plan_.levels[p];
      forward_diagonal(p);
      const auto through = [&](Offset d, auto& to) {
        if (d.dy || d.dx) return lines_.forward(p, d, bands_.band(p), to);
        if (to.distances()) return;  // 0
        for (int y = 0; y < level.height; ++y) {
          const AddToCells<V, false> out{to.row(y), to.share};
          const V* row = plane_row(plane_, level, y);
          for (int x = 0; x < out.cells.count; ++x) out.template emit<false>(x, 2 * row[x], V{});
        }
      };
      if (p + 1 < levels()) {
        bands_.clear(p + 1);
        level.for_each_offset([&](Offset d) {
          PoolingCells<V> to(level, plan_.levels[p + 1], d, bands_.band(p + 1), spare_.data());
          through(d, to);
        });
      } else if (plan_.network.hidden) {
        level.for_each_offset([&](Offset d) {
          readout_.begin(level.rectangle(d).width);
          through(d, readout_);
          readout_.flush(sum, unused);
        });
      }
    }
    if (plan_.network.hidden) {  // as after a pooling: the variance of a mean is the mean variance
                                 // less the spread
      spread = Lanes<T>::from([&](int lane) { return sum[lane] * plan_.readout_share(); });
      variance = mean_diagonal();
      for (int k = 0; k < kParts<T>; ++k) variance.part[k] -= spread.part[k];
    }
    return table_;
  }

  // After `forward`: the gradient by the pixels, halved, of the function whose gradient by the
  // variances is q_bar.
  const Buffer<V>& backward(const V* q_bar) {
    pixel_bar_.clear();
    sigma_.clear();
    V n_bar{};
    for (Index e = plan_.variances; e-- > plan_.convolution_variances();)
      n_bar = (q_bar[e] + n_bar * T(0.5)) * T(plan_.network.w);
    readout_.set_cotangents(plan_.network.hidden ? n_bar * T(plan_.readout_share()) : n_bar, V{});
    spare_.clear();
    for (int p = levels() - 1; p >= 0; --p) {
      const Level& level = plan_.levels[p];
      const auto through = [&](Offset d, auto& from) {
        if (d.dy || d.dx)
          lines_.backward(p, d, bands_.band(p), from, pixel_bar_.data(), sigma_.data());
        else
          backward_diagonal(p, from, q_bar);
      };
      const auto at = [&](Offset d) {
        if (p + 1 < levels()) {
          PoolingCells<V> from(level, plan_.levels[p + 1], d, bands_.band(p + 1), spare_.data());
          through(d, from);
        } else {
          readout_.begin(level.rectangle(d).width);
          through(d, readout_);
        }
      };
      level.for_each_offset([&](Offset d) {
        if (d.dy || d.dx) at(d);
      });
      at({0, 0});  // last: it takes what all the others give to sigma
    }
    return pixel_bar_;
  }

 private:
  int levels() const { return static_cast<int>(plan_.levels.size()); }

  static V* plane_row(Buffer<V>& plane, const Level& level, int y) {
    return plane.data() + y * (level.width + 1);
  }
  ThreeRows<V> three(const Level& level, int y) {
    return {y ? plane_row(plane_, level, y - 1) : zeros_.data(), plane_row(plane_, level, y),
            y + 1 < level.height ? plane_row(plane_, level, y + 1) : zeros_.data()};
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

  // At offset 0 the cosine is 1: the variances themselves. Leaves the level's output in plane_.
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
          std::memcpy(row, bands_.n[p].data() + level.start({0, 0}) + y * (width + 1),
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

  // Pools the variances in plane_: the variance of a mean is the mean variance less the spread,
  // which the band holds at offset 0.
  void pool_diagonal(int p) {
    const Level &level = plan_.levels[p], &below = plan_.levels[p - 1];
    V* pooled = table_.data() + plan_.convolution_variances() + level.first_pooled;
    for (int y = 0; y < level.height; ++y) {
      const V *even = plane_row(plane_, below, 2 * y), *odd = plane_row(plane_, below, 2 * y + 1);
      const V* m = bands_.n[p].data() + level.start({0, 0}) + y * (level.width + 1);
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
          bands_.n[p][level.start({0, 0}) + y * (width + 1) + x] = row[x] / 32;
      } else {
        for (int e = 0; e < width * channels; ++e)
          pixel_bar_[first + e] += row[e / channels] * images_.pixels[first + e] / T(channels);
      }
    }
  }

  const Plan& plan_;
  Lines<T, V, false> lines_;
  BandBuffers<V> bands_;
  Image<V> images_{};
  Buffer<V> table_, inverse_, deviation_, pixel_bar_, sigma_, zeros_, spare_, plane_, next_plane_;
  Readout<V> readout_;
};

}  // namespace kip
