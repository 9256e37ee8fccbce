// Blocks of kernel entries: tiles of right images, units of work, and sums in a fixed order.
#pragma once

#include <cmath>

#include "engine.h"
#include "parallel.h"

namespace kip {

template <class T>
Index tiles_of(Index count) {
  return (count + kLanes<T> - 1) / kLanes<T>;
}

// `count` images, their tables: the variances of their convolutions' ReLU inputs, then the pooled
// values; and, where there are hidden layers, the variance and the spread of what the readout
// reads.
template <class T>
struct ImageSet {
  const T* pixels;         // [count, H, W, D]
  const T* tables;         // [count, table]
  const double* readouts;  // [count, 2]
  Index count;

  Index tiles() const { return tiles_of<T>(count); }
};

// Bytes of intermediate results kept between a round of units and their sum.
inline constexpr Index kRoundBytes = Index(1) << 26;

// Entry `e` of rows `stride` apart, of a tile's images (the last one repeated past the end), one a
// lane: f(value) of each e < size.
template <class T, class F>
void across_lanes(const T* rows, Index stride, Index size, Index count, Index tile, Vector<T>* out,
                  F f) {
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

// The left images' tables.
template <class T>
struct LeftTables {
  LeftTables(const Plan& plan, ImageSet<T> x)
      : plan(plan),
        count(plan.convolution_variances()),
        pixels(x.pixels),
        tables(x.tables),
        inverse(x.count * count),
        deviation(x.count * count),
        head(x.count * head_size(plan)) {
    for (Index i = 0; i < x.count; ++i) {
      for (Index e = 0; e < count; ++e) {
        const T q = tables[i * plan.table() + e];
        inverse[i * count + e] = kip::inverse(q), deviation[i * count + e] = kip::deviation(q);
      }
      fill_head(plan, x.readouts + 2 * i, head.data() + i * head_size(plan));
    }
  }
  Image<T> image(Index i) const {
    return {pixels + i * plan.image_size(), inverse.data() + i * count,
            deviation.data() + i * count, tables + i * plan.table() + count,
            head.data() + i * head_size(plan)};
  }

  const Plan& plan;
  const Index count;
  const T *pixels, *tables;
  Buffer<T> inverse, deviation;
  Buffer<double> head;
};

// Tiles of right images, with their tables.
template <class T>
struct RightTables {
  using V = Vector<T>;
  RightTables(const Plan& plan, ImageSet<T> x, Index first_tile, Index tiles, std::size_t threads)
      : plan(plan),
        count(plan.convolution_variances()),
        pixels(tiles * plan.image_size()),
        inverse(tiles * count),
        deviation(tiles * count),
        pooled(tiles * plan.pooled),
        head(tiles * head_size(plan) * kParts<T>) {
    parallel_for(threads, tiles, [&](std::size_t, Index k) {
      const auto spread_out = [&](const T* rows, Index stride, Index size, Buffer<V>& out,
                                  T (*f)(T)) {
        across_lanes(rows, stride, size, x.count, first_tile + k, out.data() + k * size, f);
      };
      spread_out(x.pixels, plan.image_size(), plan.image_size(), pixels, same<T>);
      spread_out(x.tables, plan.table(), count, inverse, kip::inverse<T>);
      spread_out(x.tables, plan.table(), count, deviation, kip::deviation<T>);
      spread_out(x.tables + count, plan.table(), plan.pooled, pooled, same<T>);
      std::vector<double> values(head_size(plan));
      double* to = reinterpret_cast<double*>(head.data() + k * head_size(plan) * kParts<T>);
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        fill_head(plan, x.readouts + 2 * std::min((first_tile + k) * kLanes<T> + lane, x.count - 1),
                  values.data());
        for (Index e = 0; e < head_size(plan); ++e) to[e * kLanes<T> + lane] = values[e];
      }
    });
  }
  Image<V> tile(Index k) const {
    return {pixels.data() + k * plan.image_size(), inverse.data() + k * count,
            deviation.data() + k * count, pooled.data() + k * plan.pooled,
            head.data() + k * head_size(plan) * kParts<T>};
  }

  const Plan& plan;
  const Index count;
  Buffer<V> pixels, inverse, deviation, pooled;
  Buffer<VectorD> head;
};

template <class T, class Engine>
std::vector<Engine> make_engines(const Plan& plan, Index units, std::size_t threads) {
  std::vector<Engine> engines;
  for (std::size_t k = 0; k < threads && Index(k) < std::max<Index>(units, 1); ++k)
    engines.emplace_back(plan);
  return engines;
}

// Calls f(image, lane) for each image of a tile.
template <class T, class F>
void for_each_image(Index count, Index tile, F f) {
  for (int lane = 0; lane < kLanes<T> && tile * kLanes<T> + lane < count; ++lane)
    f(tile * kLanes<T> + lane, lane);
}

// Runs f(worker, tile, pixels) for each tile of images [count, H, W, D]; the tile's pixels have an
// image a lane.
template <class T, class F>
void for_each_tile(const Plan& plan, const T* pixels, Index count, std::size_t workers, F f) {
  std::vector<Buffer<Vector<T>>> lanes;
  for (std::size_t k = 0; k < workers; ++k) lanes.emplace_back(plan.image_size());
  parallel_for(workers, tiles_of<T>(count), [&](std::size_t worker, Index tile) {
    across_lanes(pixels, plan.image_size(), plan.image_size(), count, tile, lanes[worker].data(),
                 same<T>);
    f(worker, tile, lanes[worker].data());
  });
}

// The tables [count, table] of images [count, H, W, D], and their readouts [count, 2].
template <class T>
void compute_tables(const Plan& plan, const T* pixels, Index count, T* tables, double* readouts,
                    std::size_t threads) {
  const auto store = [&](Index tile, const Lanes<T>& variance, const Lanes<T>& spread) {
    for_each_image<T>(count, tile, [&](Index image, int lane) {
      readouts[2 * image] = variance.get(lane), readouts[2 * image + 1] = spread.get(lane);
    });
  };
  if (plan.fully_connected()) {
    return for_each_tile(plan, pixels, count, threads,
                         [&](std::size_t, Index tile, const Vector<T>* lanes) {
                           Lanes<T> variance = squares<T>(lanes, plan.image_size());
                           for (auto& part : variance.part) part *= plan.dot_product_share();
                           store(tile, variance, {});
                         });
  }
  auto engines = make_engines<T, VarianceEngine<T>>(plan, tiles_of<T>(count), threads);
  for_each_tile(plan, pixels, count, engines.size(),
                [&](std::size_t worker, Index tile, const Vector<T>* lanes) {
                  Lanes<T> variance, spread;
                  const auto& values = engines[worker].forward(lanes, variance, spread);
                  for_each_image<T>(count, tile, [&](Index image, int lane) {
                    for (Index e = 0; e < plan.table(); ++e)
                      tables[image * plan.table() + e] = values[e][lane];
                  });
                  store(tile, variance, spread);
                });
}

// Adds to gradient [count, H, W, D] what the variances contribute, given their cotangents q_bar
// [count, variances].
template <class T>
void add_variances_vjp(const Plan& plan, const T* pixels, Index count, const double* q_bar,
                       double* gradient, std::size_t threads) {
  if (plan.fully_connected()) {
    return parallel_for(threads, count, [&](std::size_t, Index image) {
      double n_bar = 0;
      for (Index e = plan.variances; e-- > 0;)
        n_bar = (q_bar[image * plan.variances + e] + n_bar * 0.5) * plan.network.w;
      for (Index e = image * plan.image_size(); e < (image + 1) * plan.image_size(); ++e)
        gradient[e] += 4 * (n_bar * plan.readout_share()) * double(pixels[e]) / plan.channels;
    });
  }
  auto engines = make_engines<T, VarianceEngine<T>>(plan, tiles_of<T>(count), threads);
  for_each_tile(plan, pixels, count, engines.size(),
                [&](std::size_t worker, Index tile, const Vector<T>* lanes) {
                  VarianceEngine<T>& engine = engines[worker];
                  Lanes<T> variance, spread;
                  engine.forward(lanes, variance, spread);
                  Buffer<Vector<T>> bars(plan.variances);
                  for_each_image<T>(count, tile, [&](Index image, int lane) {
                    for (Index e = 0; e < plan.variances; ++e)
                      bars[e][lane] = T(q_bar[image * plan.variances + e]);
                  });
                  const auto& pixel_bar = engine.backward(bars.data());
                  for_each_image<T>(count, tile, [&](Index image, int lane) {
                    for (Index e = 0; e < plan.image_size(); ++e)
                      gradient[image * plan.image_size() + e] += 2 * double(pixel_bar[e][lane]);
                  });
                });
}

// Runs f(engine, i, k, tile, right) for each left image and each of the tiles, `per_round` tiles at
// a time, and after(first_tile, tiles) after each round.
template <class T, class F, class After>
void for_each_unit(const Plan& plan, ImageSet<T> x1, ImageSet<T> x2, Index per_round,
                   std::size_t threads, F f, After after) {
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

inline Index tiles_per_round(Index bytes_per_tile) {
  return std::max<Index>(1, kRoundBytes / std::max<Index>(1, bytes_per_tile));
}

template <class T>
Index tile_bytes(const Plan& plan) {
  return (plan.image_size() + 2 * plan.convolution_variances() + plan.pooled +
          head_size(plan) * kParts<T>)*kVectorBytes;
}

template <class T>
void store_block(Vector<T> values, Index i, Index tile, Index count, T* block) {
  for_each_image<T>(count, tile, [&](Index j, int lane) { block[i * count + j] = values[lane]; });
}

// Fully-connected networks: matrix products, several left images at a time so that each value
// loaded is used as often.
inline constexpr int kGroup = 8;

// Vectors of a row at a time: with the group's, as many sums as registers.
inline constexpr int kColumns = kVectorBytes == 64 ? 3 : 1;

// Adds sum_j weights[i, j] rows[j, e] to sums[i, e] for all i, and e from `first` for kColumns
// vectors (up to `size`), in double: near the cusp most of the sum and of what the variances
// contribute cancel.
template <class T>
void add_weighted_rows(const double* weights, Index images, const T* rows, Index count, Index size,
                       Index first, double* sums, Index stride) {
  constexpr Index kRows = 64, kWidth = kColumns * kLanes<double>;
  const Index width = std::min(kWidth, size - first);
  Buffer<VectorD> packed(
      kRows *
      kColumns);  // where they lie, the same columns of all rows may share a few lines of the cache
  for (Index begin = 0; begin < count; begin += kRows) {
    const Index run = std::min(kRows, count - begin);
    for (Index j = 0; j < run; ++j) {
      const T* row = rows + (begin + j) * size + first;
      std::copy(row, row + width, reinterpret_cast<double*>(packed.data() + j * kColumns));
    }
    for (Index i = 0; i < images; i += kGroup) {
      const double* from[kGroup];
      for (int g = 0; g < kGroup; ++g)
        from[g] = weights + std::min(i + g, images - 1) * count + begin;
      VectorD total[kGroup][kColumns] = {};
      for (Index j = 0; j < run; ++j)
        for (int g = 0; g < kGroup; ++g)
          for (int c = 0; c < kColumns; ++c)
            total[g][c] += spread<VectorD>(from[g][j]) * packed[j * kColumns + c];
      for (int g = 0; g < std::min<Index>(kGroup, images - i); ++g) {
        double values[kWidth];
        std::memcpy(values, total[g], sizeof(values));
        for (Index e = 0; e < width; ++e) sums[(i + g) * stride + first + e] += values[e];
      }
    }
  }
}

// Calls f(head, kernel, i, tile) for each pair of a left image and a tile (symmetric: that reaches
// above the diagonal), after head.forward.
template <class T, class F>
void for_each_dense_unit(const Plan& plan, ImageSet<T> x1, ImageSet<T> x2, bool symmetric,
                         std::size_t threads, F f) {
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
      for (int g = 0; g < kGroup; ++g)
        images[g] = x1.pixels + std::min(begin + g, x1.count - 1) * size;
      Lanes<T> n[kGroup];
      dot_products<T>(images, right.tile(k).pixels, size, n);
      for (Index i = begin; i < std::min(begin + kGroup, x1.count); ++i) {
        for (auto& part : n[i - begin].part) part *= plan.dot_product_share();
        Head<T>& head = heads[worker];
        const Lanes<T> kernel =
            head.forward(left.image(i).head, right.tile(k).head, n[i - begin], {});
        f(head, kernel.narrowed(), i, first + k);
      }
    });
  }
}

template <class T>
void compute_dense_block(const Plan& plan, ImageSet<T> x1, ImageSet<T> x2, bool symmetric, T* block,
                         std::size_t threads) {
  for_each_dense_unit(plan, x1, x2, symmetric, threads,
                      [&](Head<T>&, Vector<T> kernel, Index i, Index tile) {
                        store_block<T>(kernel, i, tile, x2.count, block);
                      });
}

// block [A, B]. symmetric: x1 and x2 are the same images.
template <class T>
void compute_block(const Plan& plan, ImageSet<T> x1, ImageSet<T> x2, bool symmetric, T* block,
                   std::size_t threads) {
  if (plan.fully_connected()) {
    compute_dense_block(plan, x1, x2, symmetric, block, threads);
  } else {
    for_each_unit(
        plan, x1, x2, tiles_per_round(tile_bytes<T>(plan)), threads,
        [&](PairEngine<T>& engine, Image<T> left, Image<Vector<T>> right, Index i, Index,
            Index tile) {
          if (symmetric && (tile + 1) * kLanes<T> <= i) return;
          store_block<T>(engine.forward(left, right), i, tile, x2.count, block);
        },
        [](Index, Index) {});
  }
  if (!symmetric) return;
  for (Index i = 0; i < x1.count; ++i)
    for (Index j = 0; j < i; ++j) block[i * x2.count + j] = block[j * x2.count + i];
}

// The derivatives of each kernel entry by its left image: per pair pixels [H, W, D], then those by
// deviations [variances].
inline Index derivatives(const Plan& plan) { return plan.image_size() + plan.variances; }

// The variances' part of the gradient, and the sum: sums [A, derivatives] -> gradient [A, H, W, D].
template <class T>
void finish_gradient(const Plan& plan, const Plan& variance_plan, ImageSet<T> x1,
                     const Buffer<double>& sums, T* gradient, std::size_t threads) {
  const Index size = plan.image_size(), count = plan.variances;
  Buffer<double> pixel_bar(x1.count * size), q_bar(x1.count * count);
  for (Index i = 0; i < x1.count; ++i) {
    const double* from = sums.data() + i * derivatives(plan);
    std::copy(from, from + size, pixel_bar.data() + i * size);
    const auto divide = [&](Index e, double q) {
      q_bar[i * count + e] = q > 0 ? from[size + e] / (2 * q) : 0;
    };
    for (Index e = 0; e < plan.convolution_variances(); ++e)
      divide(e, x1.tables[i * plan.table() + e]);
    for_each_hidden(plan, x1.readouts[2 * i],
                    [&](int l, double q) { divide(plan.convolution_variances() + l, q); });
  }
  if (count)
    add_variances_vjp(variance_plan, x1.pixels, x1.count, q_bar.data(), pixel_bar.data(), threads);
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
    for_each_image<T>(count, tile,
                      [&](Index j, int lane) { values[lane] = cotangent[i * count + j]; });
  }
  double values[kLanes<T>] = {};
};

template <class T>
void compute_dense_vjp(const Plan& plan, const Plan& variance_plan, ImageSet<T> x1, ImageSet<T> x2,
                       const T* cotangent, T* block, T* gradient, std::size_t threads) {
  const Index size = plan.image_size(), variances = plan.variances, count = derivatives(plan),
              tiles = x2.tiles();
  Buffer<double> weights(x1.count * x2.count);          // of x2's pixels in the gradient by x1's
  Buffer<double> pieces(x1.count * tiles * variances);  // of sigma
  Buffer<double> sums(x1.count * count);
  for_each_dense_unit(plan, x1, x2, false, threads,
                      [&](Head<T>& head, Vector<T> kernel, Index i, Index tile) {
                        store_block<T>(kernel, i, tile, x2.count, block);
                        const Weights<T> lanes(cotangent, i, tile, x2.count);
                        double* piece = pieces.data() + (i * tiles + tile) * variances;
                        Lanes<T> n_bar, t_bar;
                        head.backward(n_bar, t_bar, [&](int l, const Lanes<T>& sigma) {
                          for (int lane = 0; lane < kLanes<T>; ++lane)
                            piece[l] += lanes.values[lane] * sigma.get(lane);
                        });
                        for_each_image<T>(x2.count, tile, [&](Index j, int lane) {
                          weights[i * x2.count + j] =
                              n_bar.get(lane) * lanes.values[lane] * plan.dot_product_share();
                        });
                      });
  constexpr Index kWidth = kColumns * kLanes<double>;
  parallel_for(threads, (size + kWidth - 1) / kWidth, [&](std::size_t, Index unit) {
    add_weighted_rows(weights.data(), x1.count, x2.pixels, x2.count, size, unit * kWidth,
                      sums.data(), count);
  });
  for (Index i = 0; i < x1.count; ++i)
    for (Index tile = 0; tile < tiles; ++tile)
      for (Index e = 0; e < variances; ++e)
        sums[i * count + size + e] += pieces[(i * tiles + tile) * variances + e];
  finish_gradient(plan, variance_plan, x1, sums, gradient, threads);
}

// block [A, B], and the gradient [A, H, W, D] of sum(block * cotangent [A, B]) by x1.
template <class T>
void compute_vjp(const Plan& plan, const Plan& variance_plan, ImageSet<T> x1, ImageSet<T> x2,
                 const T* cotangent, T* block, T* gradient, std::size_t threads) {
  if (plan.fully_connected())
    return compute_dense_vjp(plan, variance_plan, x1, x2, cotangent, block, gradient, threads);
  const Index size = plan.image_size(), count = derivatives(plan);
  const Index per_round =
      std::min(x2.tiles(), tiles_per_round(tile_bytes<T>(plan) + x1.count * count * sizeof(T)));
  Buffer<T> pieces(x1.count * per_round * count);
  Buffer<double> sums(x1.count * count);
  for_each_unit(
      plan, x1, x2, per_round, threads,
      [&](PairEngine<T>& engine, Image<T> left, Image<Vector<T>> right, Index i, Index k,
          Index tile) {
        store_block<T>(engine.forward(left, right), i, tile, x2.count, block);
        engine.backward(left, right);
        const Weights<T> weights(cotangent, i, tile, x2.count);
        T* piece = pieces.data() + (i * per_round + k) * count;
        contract(lanes_of(engine.pixel_bar()), size, weights.values,
                 [&](Index e, double sum) { piece[e] = T(sum); });
        contract(lanes_of(engine.sigma()), plan.variances, weights.values,
                 [&](Index e, double sum) { piece[size + e] = T(sum); });
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

// block [A, B], and the derivatives [A, tiles, derivatives, lanes] from which `pull_back` forms a
// gradient once the cotangent is known.
template <class T>
void compute_derivatives(const Plan& plan, ImageSet<T> x1, ImageSet<T> x2, T* block, T* values,
                         std::size_t threads) {
  const Index size = plan.image_size(), count = derivatives(plan);
  for_each_unit(
      plan, x1, x2, tiles_per_round(tile_bytes<T>(plan)), threads,
      [&](PairEngine<T>& engine, Image<T> left, Image<Vector<T>> right, Index i, Index,
          Index tile) {
        store_block<T>(engine.forward(left, right), i, tile, x2.count, block);
        engine.backward(left, right);
        T* to = values + (i * x2.tiles() + tile) * count * kLanes<T>;
        std::memcpy(to, engine.pixel_bar().data(), size * kVectorBytes);
        std::memcpy(to + size * kLanes<T>, engine.sigma().data(), plan.variances * kVectorBytes);
      },
      [](Index, Index) {});
}

template <class T>
void pull_back(const Plan& plan, const Plan& variance_plan, ImageSet<T> x1, Index right_count,
               const T* values, const T* cotangent, T* gradient, std::size_t threads) {
  const Index count = derivatives(plan), tiles = tiles_of<T>(right_count);
  Buffer<double> sums(x1.count * count);
  parallel_for(threads, x1.count, [&](std::size_t, Index i) {
    double* sum = sums.data() + i * count;
    for (Index tile = 0; tile < tiles; ++tile) {
      const Weights<T> weights(cotangent, i, tile, right_count);
      contract(values + (i * tiles + tile) * count * kLanes<T>, count, weights.values,
               [&](Index e, double value) { sum[e] += value; });
    }
  });
  finish_gradient(plan, variance_plan, x1, sums, gradient, threads);
}

}  // namespace kip
