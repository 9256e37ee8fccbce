// Blocks of kernel entries: tiles of right images, units of work, and sums in a fixed order.
#pragma once

#include <cmath>

#include "engine.h"
#include "parallel.h"

namespace kip {

// `count` images, and their tables: the variances of their ReLU inputs, then the pooled values.
template <class T>
struct ImageSet {
  const T* pixels;  // [count, H, W, D]
  const T* tables;  // [count, table]
  Index count;

  Index tiles() const { return (count + kLanes<T> - 1) / kLanes<T>; }
};

// Bytes of intermediate results kept between a round of units and their sum.
inline constexpr Index kRoundBytes = Index(1) << 26;

// Entry `e` of rows `stride` apart, of a tile's images (the last one repeated past the end), one a lane: f(value) of each e < size.
template <class T, class F>
void across_lanes(const T* rows, Index stride, Index size, Index count, Index tile, Vector<T>* out, F f) {
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    const T* row = rows + std::min(tile * kLanes<T> + lane, count - 1) * stride;
    T* to = reinterpret_cast<T*>(out) + lane;
    for (Index e = 0; e < size; ++e) to[e * kLanes<T>] = f(row[e]);
  }
}

template <class T>
T same(T value) {
  return value;
}

// See Image; correctly rounded, which halves the rounding of cosines.
template <class T>
T inverse(T q) {
  return q > 0 ? T(1 / std::sqrt(kPi * double(q))) : T(0);
}
template <class T>
T deviation(T q) {
  return std::sqrt(q / 2);
}

// The left images' tables.
template <class T>
struct LeftTables {
  LeftTables(const Plan& plan, ImageSet<T> x)
      : plan(plan), pixels(x.pixels), tables(x.tables), inverse(x.count * plan.variances), deviation(x.count * plan.variances) {
    for (Index i = 0; i < x.count; ++i)
      for (Index e = 0; e < plan.variances; ++e) {
        const T q = tables[i * plan.table() + e];
        inverse[i * plan.variances + e] = kip::inverse(q), deviation[i * plan.variances + e] = kip::deviation(q);
      }
  }
  Image<T> image(Index i) const {
    return {pixels + i * plan.image_size(), inverse.data() + i * plan.variances, deviation.data() + i * plan.variances,
            tables + i * plan.table() + plan.variances};
  }

  const Plan& plan;
  const T *pixels, *tables;
  Buffer<T> inverse, deviation;
};

// Tiles of right images, with their tables.
template <class T>
struct RightTables {
  using V = Vector<T>;
  RightTables(const Plan& plan, ImageSet<T> x, Index first_tile, Index tiles, std::size_t threads)
      : plan(plan),
        pixels(tiles * plan.image_size()),
        inverse(tiles * plan.variances),
        deviation(tiles * plan.variances),
        pooled(tiles * plan.pooled) {
    parallel_for(threads, tiles, [&](std::size_t, Index k) {
      const auto spread_out = [&](const T* rows, Index stride, Index size, Buffer<V>& out, T (*f)(T)) {
        across_lanes(rows, stride, size, x.count, first_tile + k, out.data() + k * size, f);
      };
      spread_out(x.pixels, plan.image_size(), plan.image_size(), pixels, same<T>);
      spread_out(x.tables, plan.table(), plan.variances, inverse, kip::inverse<T>);
      spread_out(x.tables, plan.table(), plan.variances, deviation, kip::deviation<T>);
      spread_out(x.tables + plan.variances, plan.table(), plan.pooled, pooled, same<T>);
    });
  }
  Image<V> tile(Index k) const {
    return {pixels.data() + k * plan.image_size(), inverse.data() + k * plan.variances, deviation.data() + k * plan.variances,
            pooled.data() + k * plan.pooled};
  }

  const Plan& plan;
  Buffer<V> pixels, inverse, deviation, pooled;
};

template <class T, class Engine>
std::vector<Engine> make_engines(const Plan& plan, Index units, std::size_t threads) {
  std::vector<Engine> engines;
  for (std::size_t k = 0; k < threads && Index(k) < std::max<Index>(units, 1); ++k) engines.emplace_back(plan);
  return engines;
}

// Calls f(image, lane) for each image of a tile.
template <class T, class F>
void for_each_image(Index count, Index tile, F f) {
  for (int lane = 0; lane < kLanes<T> && tile * kLanes<T> + lane < count; ++lane) f(tile * kLanes<T> + lane, lane);
}

// Runs f(engine, tile, pixels) for each tile of images [count, H, W, D]; the tile's pixels have an image a lane.
template <class T, class F>
void for_each_tile(const Plan& plan, const T* pixels, Index count, std::size_t threads, F f) {
  const Index tiles = ImageSet<T>{pixels, nullptr, count}.tiles();
  auto engines = make_engines<T, VarianceEngine<T>>(plan, tiles, threads);
  std::vector<Buffer<Vector<T>>> lanes;
  for (std::size_t k = 0; k < engines.size(); ++k) lanes.emplace_back(plan.image_size());
  parallel_for(engines.size(), tiles, [&](std::size_t worker, Index tile) {
    across_lanes(pixels, plan.image_size(), plan.image_size(), count, tile, lanes[worker].data(), same<T>);
    f(engines[worker], tile, lanes[worker].data());
  });
}

// The tables [count, table] of images [count, H, W, D].
template <class T>
void compute_tables(const Plan& plan, const T* pixels, Index count, T* tables, std::size_t threads) {
  for_each_tile(plan, pixels, count, threads, [&](VarianceEngine<T>& engine, Index tile, const Vector<T>* lanes) {
    const auto& values = engine.forward(lanes);
    for_each_image<T>(count, tile, [&](Index image, int lane) {
      for (Index e = 0; e < plan.table(); ++e) tables[image * plan.table() + e] = values[e][lane];
    });
  });
}

// Adds to gradient [count, H, W, D] what the variances contribute, given their cotangents q_bar [count, variances].
template <class T>
void add_variances_vjp(const Plan& plan, const T* pixels, Index count, const double* q_bar, double* gradient, std::size_t threads) {
  for_each_tile(plan, pixels, count, threads, [&](VarianceEngine<T>& engine, Index tile, const Vector<T>* lanes) {
    engine.forward(lanes);
    Buffer<Vector<T>> bars(plan.variances);
    for_each_image<T>(count, tile, [&](Index image, int lane) {
      for (Index e = 0; e < plan.variances; ++e) bars[e][lane] = T(q_bar[image * plan.variances + e]);
    });
    const auto& pixel_bar = engine.backward(bars.data());
    for_each_image<T>(count, tile, [&](Index image, int lane) {
      for (Index e = 0; e < plan.image_size(); ++e) gradient[image * plan.image_size() + e] += 2 * double(pixel_bar[e][lane]);
    });
  });
}

// Runs f(engine, i, k, tile, right) for each left image and each of the tiles, `per_round` tiles at a time, and after(first_tile, tiles)
// after each round.
template <class T, class F, class After>
void for_each_unit(const Plan& plan, ImageSet<T> x1, ImageSet<T> x2, Index per_round, std::size_t threads, F f, After after) {
  const LeftTables<T> left(plan, x1);
  auto engines = make_engines<T, PairEngine<T>>(plan, x1.count * x2.tiles(), threads);
  for (Index first = 0; first < x2.tiles(); first += per_round) {
    const Index tiles = std::min(per_round, x2.tiles() - first);
    const RightTables<T> right(plan, x2, first, tiles, engines.size());
    parallel_for(engines.size(), x1.count * tiles, [&](std::size_t worker, Index unit) {
      const Index k = unit / x1.count, i = unit % x1.count;
      f(engines[worker], left.image(i), right.tile(k), i, k, first + k);
    });
    after(first, tiles);
  }
}

inline Index tiles_per_round(Index bytes_per_tile) { return std::max<Index>(1, kRoundBytes / std::max<Index>(1, bytes_per_tile)); }

template <class T>
Index tile_bytes(const Plan& plan) {
  return (plan.image_size() + 2 * plan.variances + plan.pooled) * kVectorBytes;
}

template <class T>
void store_block(Vector<T> values, Index i, Index tile, Index count, T* block) {
  for_each_image<T>(count, tile, [&](Index j, int lane) { block[i * count + j] = values[lane]; });
}

// Fully-connected networks: matrix products, several left images at a time so that each value loaded is used as often.
inline constexpr int kGroup = 8;

inline constexpr int kColumns = kVectorBytes == 64 ? 3 : 1;  // vectors of a row at a time: with the group's, as many sums as registers

// Adds sum_j weights[i, j] rows[j, e] to sums[i, e] for all i, and e from `first` for kColumns vectors (up to `size`).
template <class T>
void add_weighted_rows(const T* weights, Index images, const T* rows, Index count, Index size, Index first, double* sums, Index stride) {
  constexpr Index kRun = 64, kWidth = kColumns * kLanes<T>;
  const Index width = std::min(kWidth, size - first);
  Buffer<Vector<T>> packed(kRun * kColumns);  // where they lie, the same columns of all rows may share a few lines of the cache
  for (Index begin = 0; begin < count; begin += kRun) {
    const Index run = std::min(kRun, count - begin);
    for (Index j = 0; j < run; ++j) std::memcpy(packed.data() + j * kColumns, rows + (begin + j) * size + first, width * sizeof(T));
    for (Index i = 0; i < images; i += kGroup) {
      const T* from[kGroup];
      for (int g = 0; g < kGroup; ++g) from[g] = weights + std::min(i + g, images - 1) * count + begin;
      Vector<T> total[kGroup][kColumns] = {};
      for (Index j = 0; j < run; ++j)
        for (int g = 0; g < kGroup; ++g)
          for (int c = 0; c < kColumns; ++c) total[g][c] += spread<Vector<T>>(from[g][j]) * packed[j * kColumns + c];
      for (int g = 0; g < std::min<Index>(kGroup, images - i); ++g) {
        T values[kWidth];
        std::memcpy(values, total[g], sizeof(values));
        for (Index e = 0; e < width; ++e) sums[(i + g) * stride + first + e] += values[e];
      }
    }
  }
}

// Calls f(head, left, right, i, tile, n) for each pair of a left image and a tile (symmetric: that reaches above the diagonal); n is the
// readout's covariance.
template <class T, class F>
void for_each_dense_unit(const Plan& plan, ImageSet<T> x1, ImageSet<T> x2, bool symmetric, std::size_t threads, F f) {
  const LeftTables<T> left(plan, x1);
  const Index groups = (x1.count + kGroup - 1) / kGroup, size = plan.image_size();
  auto heads = make_engines<T, Head<T>>(plan, groups * x2.tiles(), threads);
  const Index per_round = tiles_per_round(tile_bytes<T>(plan));
  for (Index first = 0; first < x2.tiles(); first += per_round) {
    const Index tiles = std::min(per_round, x2.tiles() - first);
    const RightTables<T> right(plan, x2, first, tiles, heads.size());
    parallel_for(heads.size(), groups * tiles, [&](std::size_t worker, Index unit) {
      const Index k = unit / groups, begin = unit % groups * kGroup;
      if (symmetric && (first + k + 1) * kLanes<T> <= begin) return;
      const T* images[kGroup];
      for (int g = 0; g < kGroup; ++g) images[g] = x1.pixels + std::min(begin + g, x1.count - 1) * size;
      Vector<T> n[kGroup];
      dot_products([&](int g, Index e) { return spread<Vector<T>>(images[g][e]); }, right.tile(k).pixels, size, n);
      for (Index i = begin; i < std::min(begin + kGroup, x1.count); ++i)
        f(heads[worker], left.image(i), right.tile(k), i, first + k, n[i - begin] * T(plan.dot_product_share()));
    });
  }
}

template <class T>
void compute_dense_block(const Plan& plan, ImageSet<T> x1, ImageSet<T> x2, bool symmetric, T* block, std::size_t threads) {
  for_each_dense_unit(plan, x1, x2, symmetric, threads,
                      [&](Head<T>& head, Image<T> left, Image<Vector<T>> right, Index i, Index tile, Vector<T> n) {
                        store_block<T>(head.forward(left, right, n, Vector<T>{}), i, tile, x2.count, block);
                      });
}

// block [A, B]. symmetric: x1 and x2 are the same images.
template <class T>
void compute_block(const Plan& plan, ImageSet<T> x1, ImageSet<T> x2, bool symmetric, T* block, std::size_t threads) {
  if (plan.fully_connected()) {
    compute_dense_block(plan, x1, x2, symmetric, block, threads);
  } else {
    for_each_unit(
        plan, x1, x2, tiles_per_round(tile_bytes<T>(plan)), threads,
        [&](PairEngine<T>& engine, Image<T> left, Image<Vector<T>> right, Index i, Index, Index tile) {
          if (symmetric && (tile + 1) * kLanes<T> <= i) return;
          store_block<T>(engine.forward(left, right), i, tile, x2.count, block);
        },
        [](Index, Index) {});
  }
  if (!symmetric) return;
  for (Index i = 0; i < x1.count; ++i)
    for (Index j = 0; j < i; ++j) block[i * x2.count + j] = block[j * x2.count + i];
}

// The derivatives of each kernel entry by its left image: per pair pixels [H, W, D], then those by deviations [variances].
inline Index derivatives(const Plan& plan) { return plan.image_size() + plan.variances; }

// The variances' part of the gradient, and the sum: sums [A, derivatives] -> gradient [A, H, W, D].
template <class T>
void finish_gradient(const Plan& plan, const Plan& variance_plan, ImageSet<T> x1, const Buffer<double>& sums, T* gradient,
                     std::size_t threads) {
  const Index size = plan.image_size(), count = plan.variances;
  Buffer<double> pixel_bar(x1.count * size), q_bar(x1.count * count);
  for (Index i = 0; i < x1.count; ++i) {
    const double* from = sums.data() + i * derivatives(plan);
    std::copy(from, from + size, pixel_bar.data() + i * size);
    for (Index e = 0; e < count; ++e) {
      const double q = x1.tables[i * plan.table() + e];
      q_bar[i * count + e] = q > 0 ? from[size + e] / (2 * q) : 0;
    }
  }
  if (count) add_variances_vjp(variance_plan, x1.pixels, x1.count, q_bar.data(), pixel_bar.data(), threads);
  for (Index e = 0; e < x1.count * size; ++e) gradient[e] = T(pixel_bar[e]);
}

// sum over lanes of weights * derivatives: [derivatives, lanes] -> f(e, sum).
template <class T, class F>
void contract(const T* values, Index size, const double* weights, F f) {
  for (Index e = 0; e < size; ++e, values += kLanes<T>) {
    double sum = 0;
    for (int lane = 0; lane < kLanes<T>; ++lane) sum += weights[lane] * values[lane];
    f(e, sum);
  }
}

template <class V>
const Scalar<V>* lanes_of(const Buffer<V>& buffer) {
  return reinterpret_cast<const Scalar<V>*>(buffer.data());
}

// The weights of a tile's lanes: a row of the cotangent [A, B], and 0 past its end.
template <class T>
struct Weights {
  Weights(const T* cotangent, Index i, Index tile, Index count) {
    for_each_image<T>(count, tile, [&](Index j, int lane) { values[lane] = cotangent[i * count + j]; });
  }
  double values[kLanes<T>] = {};
};

template <class T>
void compute_dense_vjp(const Plan& plan, const Plan& variance_plan, ImageSet<T> x1, ImageSet<T> x2, const T* cotangent, T* block,
                       T* gradient, std::size_t threads) {
  const Index size = plan.image_size(), variances = plan.variances, count = derivatives(plan), tiles = x2.tiles();
  Buffer<T> weights(x1.count * x2.count);          // of x2's pixels in the gradient by x1's
  Buffer<T> pieces(x1.count * tiles * variances);  // of sigma
  Buffer<double> sums(x1.count * count);
  for_each_dense_unit(plan, x1, x2, false, threads,
                      [&](Head<T>& head, Image<T> left, Image<Vector<T>> right, Index i, Index tile, Vector<T> n) {
                        store_block<T>(head.forward(left, right, n, Vector<T>{}), i, tile, x2.count, block);
                        Buffer<Vector<T>> sigma(variances);
                        Vector<T> n_bar, t_bar;
                        head.backward(n_bar, t_bar, sigma.data());
                        const Weights<T> lanes(cotangent, i, tile, x2.count);
                        for_each_image<T>(x2.count, tile, [&](Index j, int lane) {
                          weights[i * x2.count + j] = T(n_bar[lane] * lanes.values[lane] * plan.dot_product_share());
                        });
                        T* piece = pieces.data() + (i * tiles + tile) * variances;
                        contract(lanes_of(sigma), variances, lanes.values, [&](Index e, double sum) { piece[e] = T(sum); });
                      });
  constexpr Index kWidth = kColumns * kLanes<T>;
  parallel_for(threads, (size + kWidth - 1) / kWidth, [&](std::size_t, Index unit) {
    add_weighted_rows(weights.data(), x1.count, x2.pixels, x2.count, size, unit * kWidth, sums.data(), count);
  });
  for (Index i = 0; i < x1.count; ++i)
    for (Index tile = 0; tile < tiles; ++tile)
      for (Index e = 0; e < variances; ++e) sums[i * count + size + e] += pieces[(i * tiles + tile) * variances + e];
  finish_gradient(plan, variance_plan, x1, sums, gradient, threads);
}

// block [A, B], and the gradient [A, H, W, D] of sum(block * cotangent [A, B]) by x1.
template <class T>
void compute_vjp(const Plan& plan, const Plan& variance_plan, ImageSet<T> x1, ImageSet<T> x2, const T* cotangent, T* block, T* gradient,
                 std::size_t threads) {
  if (plan.fully_connected()) return compute_dense_vjp(plan, variance_plan, x1, x2, cotangent, block, gradient, threads);
  const Index size = plan.image_size(), count = derivatives(plan);
  const Index per_round = std::min(x2.tiles(), tiles_per_round(tile_bytes<T>(plan) + x1.count * count * sizeof(T)));
  Buffer<T> pieces(x1.count * per_round * count);
  Buffer<double> sums(x1.count * count);
  for_each_unit(
      plan, x1, x2, per_round, threads,
      [&](PairEngine<T>& engine, Image<T> left, Image<Vector<T>> right, Index i, Index k, Index tile) {
        store_block<T>(engine.forward(left, right), i, tile, x2.count, block);
        engine.backward(left, right);
        const Weights<T> weights(cotangent, i, tile, x2.count);
        T* piece = pieces.data() + (i * per_round + k) * count;
        contract(lanes_of(engine.pixel_bar()), size, weights.values, [&](Index e, double sum) { piece[e] = T(sum); });
        contract(lanes_of(engine.sigma()), plan.variances, weights.values, [&](Index e, double sum) { piece[size + e] = T(sum); });
      },
      [&](Index, Index tiles) {
        parallel_for(threads, x1.count, [&](std::size_t, Index i) {
          double* sum = sums.data() + i * count;
          for (Index k = 0; k < tiles; ++k) {
            const T* piece = pieces.data() + (i * per_round + k) * count;
            for (Index e = 0; e < count; ++e) sum[e] += piece[e];
          }
        });
      });
  finish_gradient(plan, variance_plan, x1, sums, gradient, threads);
}

// block [A, B], and the derivatives [A, tiles, derivatives, lanes] from which `pull_back` forms a gradient once the cotangent is known.
template <class T>
void compute_derivatives(const Plan& plan, ImageSet<T> x1, ImageSet<T> x2, T* block, T* values, std::size_t threads) {
  const Index size = plan.image_size(), count = derivatives(plan);
  for_each_unit(
      plan, x1, x2, tiles_per_round(tile_bytes<T>(plan)), threads,
      [&](PairEngine<T>& engine, Image<T> left, Image<Vector<T>> right, Index i, Index, Index tile) {
        store_block<T>(engine.forward(left, right), i, tile, x2.count, block);
        engine.backward(left, right);
        T* to = values + (i * x2.tiles() + tile) * count * kLanes<T>;
        std::memcpy(to, engine.pixel_bar().data(), size * kVectorBytes);
        std::memcpy(to + size * kLanes<T>, engine.sigma().data(), plan.variances * kVectorBytes);
      },
      [](Index, Index) {});
}

template <class T>
void pull_back(const Plan& plan, const Plan& variance_plan, ImageSet<T> x1, Index right_count, const T* values, const T* cotangent,
               T* gradient, std::size_t threads) {
  const Index count = derivatives(plan), tiles = ImageSet<T>{nullptr, nullptr, right_count}.tiles();
  Buffer<double> sums(x1.count * count);
  parallel_for(threads, x1.count, [&](std::size_t, Index i) {
    double* sum = sums.data() + i * count;
    for (Index tile = 0; tile < tiles; ++tile) {
      const Weights<T> weights(cotangent, i, tile, right_count);
      contract(values + (i * tiles + tile) * count * kLanes<T>, count, weights.values, [&](Index e, double value) { sum[e] += value; });
    }
  });
  finish_gradient(plan, variance_plan, x1, sums, gradient, threads);
}

}  // namespace kip
