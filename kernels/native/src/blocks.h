// Blocks of kernel entries and their gradients: units of work, which threads share, and sums in an
// order that does not depend on the threads.
#pragma once

#include <cmath>

#include "engine.h"
#include "parallel.h"

namespace kip {

template <class T>
Index tiles_of(Index count) {
  return (count + kLanes<T> - 1) / kLanes<T>;
}

// Images and what `compute_tables` found of them.
template <class T>
struct ImageSet {
  const T* pixels;  // [count, H, W, D]
  const T* tables;  // [count, table], see Plan::table
  const double*
      readouts;  // [count, 2]: variance and spread at the readout, if there are hidden layers
  Index count;

  Index tiles() const { return tiles_of<T>(count); }
};

// Bytes that a round of units may take for what lies between them and their sum.
inline constexpr Index kRoundBytes = Index(1) << 26;

// Sets out[e], e < size, to f(entry e) of each of a tile's rows, one a lane; rows are `stride`
// apart, and the last of the `count` is repeated past their end.
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

// The left images, laid out for engines.
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

// Some tiles of right images, laid out for engines, one image a lane.
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
      const auto lay_out = [&](const T* rows, Index stride, Index size, Buffer<V>& out, T (*f)(T)) {
        across_lanes(rows, stride, size, x.count, first_tile + k, out.data() + k * size, f);
      };
      lay_out(x.pixels, plan.image_size(), plan.image_size(), pixels, same<T>);
      lay_out(x.tables, plan.table(), count, inverse, kip::inverse<T>);
      lay_out(x.tables, plan.table(), count, deviation, kip::deviation<T>);
      lay_out(x.tables + count, plan.table(), plan.pooled, pooled, same<T>);
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

// An engine a thread, but no more than there are units of work.
template <class Engine>
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

// Calls f(worker, tile, pixels) for each tile of images [count, H, W, D], on the threads of
// `parallel_for`; the tile's pixels [H, W, D] have an image a lane.
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

// Sets the tables [count, table] of images [count, H, W, D], and their readouts [count, 2], as
// ImageSet has them. plan: of single images.
template <class T>
void compute_tables(const Plan& plan, const T* pixels, Index count, T* tables, double* readouts,
                    std::size_t threads) {
  const auto store = [&](Index tile, const Lanes<T>& variance, const Lanes<T>& spread) {
    for_each_image<T>(count, tile, [&](Index image, int lane) {
      readouts[2 * image] = variance.get(lane), readouts[2 * image + 1] = spread.get(lane);
    });
  };
  if (plan.fully_connected()) {
    return for_each_tile(plan, pixels, count, threads, [&](auto, Index tile, auto* lanes) {
      Lanes<T> variance = squares<T>(lanes, plan.image_size());
      for (auto& part : variance.part) part *= plan.dot_product_share();
      store(tile, variance, {});
    });
  }
  auto engines = make_engines<VarianceEngine<T>>(plan, tiles_of<T>(count), threads);
  for_each_tile(plan, pixels, count, engines.size(), [&](auto worker, Index tile, auto* lanes) {
    Lanes<T> variance, spread;
    const auto& values = engines[worker].forward(lanes, variance, spread);
    for_each_image<T>(count, tile, [&](Index image, int lane) {
      for (Index e = 0; e < plan.table(); ++e) tables[image * plan.table() + e] = values[e][lane];
    });
    store(tile, variance, spread);
  });
}

// Adds to gradient [count, H, W, D] the part through the variances, given their cotangents q_bar
// [count, variances]. plan: of single images.
template <class T>
void add_variances_vjp(const Plan& plan, const T* pixels, Index count, const double* q_bar,
                       double* gradient, std::size_t threads) {
  const Index size = plan.image_size(), variances = plan.variances;
  if (plan.fully_connected()) {
    return parallel_for(threads, count, [&](std::size_t, Index image) {
      double n_bar = 0;
      for (Index e = variances; e-- > 0;)
        n_bar = (q_bar[image * variances + e] + n_bar * 0.5) * plan.network.w;
      for (Index e = image * size; e < (image + 1) * size; ++e)
        gradient[e] += 4 * (n_bar * plan.readout_share()) * double(pixels[e]) / plan.channels;
    });
  }
  auto engines = make_engines<VarianceEngine<T>>(plan, tiles_of<T>(count), threads);
  for_each_tile(plan, pixels, count, engines.size(), [&](auto worker, Index tile, auto* lanes) {
    VarianceEngine<T>& engine = engines[worker];
    Lanes<T> variance, spread;
    engine.forward(lanes, variance, spread);
    Buffer<Vector<T>> bars(variances);
    for_each_image<T>(count, tile, [&](Index image, int lane) {
      for (Index e = 0; e < variances; ++e) bars[e][lane] = T(q_bar[image * variances + e]);
    });
    const auto& pixel_bar = engine.backward(bars.data());
    for_each_image<T>(count, tile, [&](Index image, int lane) {
      for (Index e = 0; e < size; ++e) gradient[image * size + e] += 2 * double(pixel_bar[e][lane]);
    });
  });
}

// The tiles in a round, given what each takes of kRoundBytes.
inline Index tiles_per_round(Index bytes_per_tile) {
  return std::max<Index>(1, kRoundBytes / std::max<Index>(1, bytes_per_tile));
}

// Bytes of a tile of right images.
template <class T>
Index tile_bytes(const Plan& plan) {
  return kVectorBytes * (plan.image_size() + 2 * plan.convolution_variances() + plan.pooled +
                         head_size(plan) * kParts<T>);
}

// Calls f(engine, right, i, k, tile) for each of `parts` parts of the left images and each tile of
// x2, `per_round` tiles at a time, of which `tile` is the k-th; and after(tiles) after each round.
// `engine` is one of the calling thread's own.
template <class Engine, class T, class F, class After>
void for_each_unit(const Plan& plan, Index parts, ImageSet<T> x2, Index per_round,
                   std::size_t threads, F f, After after) {
  auto engines = make_engines<Engine>(plan, parts * x2.tiles(), threads);
  for (Index first = 0; first < x2.tiles(); first += per_round) {
    const Index tiles = std::min(per_round, x2.tiles() - first);
    const RightTables<T> right(plan, x2, first, tiles, engines.size());
    parallel_for(engines.size(), parts * tiles, [&](std::size_t worker, Index unit) {
      const Index k = unit / parts, i = unit % parts;
      f(engines[worker], right.tile(k), i, k, first + k);
    });
    after(tiles);
  }
}

// Likewise, for units that keep nothing for `after`.
template <class Engine, class T, class F>
void for_each_unit(const Plan& plan, Index parts, ImageSet<T> x2, std::size_t threads, F f) {
  for_each_unit<Engine>(plan, parts, x2, tiles_per_round(tile_bytes<T>(plan)), threads, f,
                        [](Index) {});
}

// Stores the kernel of left image i with a tile into block [A, count].
template <class T>
void store_block(Vector<T> values, Index i, Index tile, Index count, T* block) {
  for_each_image<T>(count, tile, [&](Index j, int lane) { block[i * count + j] = values[lane]; });
}

// Fully-connected networks are matrix products: kGroup left images at a time, so that each value
// loaded is used as often.
inline constexpr int kGroup = 8;

// Vectors of a row at a time: with the group's, as many sums as registers.
inline constexpr int kColumns = kRegisters == 32 ? 3 : 1;

// Adds sum_j weights[i, j] rows[j, e] to sums[i, e] for all i, and for the e < size of kColumns
// vectors from `first`. weights [images, count], rows [count, size], sums [images, stride]. In
// double: near the cusp most of the sum, and of what the variances contribute, cancel.
template <class T>
void add_weighted_rows(const double* weights, Index images, const T* rows, Index count, Index size,
                       Index first, double* sums, Index stride) {
  constexpr Index kRows = 64, kWidth = kColumns * kLanes<double>;
  const Index width = std::min(kWidth, size - first);
  // Where they lie, the same columns of all rows may share a few lines of the cache.
  Buffer<VectorD> packed(kRows * kColumns);
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
            total[g][c] += broadcast<VectorD>(from[g][j]) * packed[j * kColumns + c];
      for (int g = 0; g < std::min<Index>(kGroup, images - i); ++g) {
        double values[kWidth];
        std::memcpy(values, total[g], sizeof(values));
        for (Index e = 0; e < width; ++e) sums[(i + g) * stride + first + e] += values[e];
      }
    }
  }
}

// Calls f(head, kernel, i, tile) for each left image and each tile (symmetric: that reaches above
// the diagonal), after head.forward. For fully-connected networks.
template <class T, class F>
void for_each_dense_unit(const Plan& plan, ImageSet<T> x1, ImageSet<T> x2, bool symmetric,
                         std::size_t threads, F f) {
  const LeftTables<T> left(plan, x1);
  const Index groups = (x1.count + kGroup - 1) / kGroup, size = plan.image_size();
  for_each_unit<Head<T>>(
      plan, groups, x2, threads,
      [&](Head<T>& head, Image<Vector<T>> right, Index group, Index, Index tile) {
        const Index begin = group * kGroup;
        if (symmetric && (tile + 1) * kLanes<T> <= begin) return;
        const T* images[kGroup];
        for (int g = 0; g < kGroup; ++g)
          images[g] = x1.pixels + std::min(begin + g, x1.count - 1) * size;
        Lanes<T> n[kGroup];
        dot_products<T>(images, right.pixels, size, n);
        for (Index i = begin; i < std::min(begin + kGroup, x1.count); ++i) {
          for (auto& part : n[i - begin].part) part *= plan.dot_product_share();
          f(head, head.forward(left.image(i).head, right.head, n[i - begin], {}).narrowed(), i,
            tile);
        }
      });
}

// Sets block [A, B]. symmetric: x1 and x2 are the same images. plan: of pairs.
template <class T>
void compute_block(const Plan& plan, ImageSet<T> x1, ImageSet<T> x2, bool symmetric, T* block,
                   std::size_t threads) {
  if (plan.fully_connected()) {
    for_each_dense_unit(plan, x1, x2, symmetric, threads,
                        [&](Head<T>&, Vector<T> kernel, Index i, Index tile) {
                          store_block<T>(kernel, i, tile, x2.count, block);
                        });
  } else {
    const LeftTables<T> left(plan, x1);
    for_each_unit<PairEngine<T>>(
        plan, x1.count, x2, threads, [&](auto& engine, auto right, Index i, Index, Index tile) {
          if (symmetric && (tile + 1) * kLanes<T> <= i) return;
          store_block<T>(engine.forward(left.image(i), right), i, tile, x2.count, block);
        });
  }
  if (!symmetric) return;
  for (Index i = 0; i < x1.count; ++i)
    for (Index j = 0; j < i; ++j) block[i * x2.count + j] = block[j * x2.count + i];
}

// Derivatives of one kernel entry by its left image: by the pixels [H, W, D], then by the
// deviations [variances], each times the deviation.
inline Index derivatives(const Plan& plan) { return plan.image_size() + plan.variances; }

// Sets gradient [A, H, W, D], given sums [A, derivatives] of derivatives times cotangents: adds the
// part through the variances. plan, variance_plan: of pairs, and of single images.
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

// Calls f(e, sum over lanes of weights[lane] values[e, lane]) for each e < size.
template <class T, class F>
void contract(const T* values, Index size, const double* weights, F f) {
  for (Index e = 0; e < size; ++e, values += kLanes<T>) {
    double sum = 0;
    for (int lane = 0; lane < kLanes<T>; ++lane) sum += weights[lane] * values[lane];
    f(e, sum);
  }
}

// The lanes of all vectors, as one array.
template <class V>
const Scalar<V>* lanes_of(const Buffer<V>& buffer) {
  return reinterpret_cast<const Scalar<V>*>(buffer.data());
}

// The weights of a tile's lanes, for left image i: its row of the cotangent [A, count], 0 past its
// end.
template <class T>
struct Weights {
  Weights(const T* cotangent, Index i, Index tile, Index count) {
    for_each_image<T>(count, tile,
                      [&](Index j, int lane) { values[lane] = cotangent[i * count + j]; });
  }
  double values[kLanes<T>] = {};
};

// As `compute_vjp`, of fully-connected networks.
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

// Sets block [A, B], and the gradient [A, H, W, D] of sum(block * cotangent [A, B]) by x1. plan,
// variance_plan: of pairs, and of single images.
template <class T>
void compute_vjp(const Plan& plan, const Plan& variance_plan, ImageSet<T> x1, ImageSet<T> x2,
                 const T* cotangent, T* block, T* gradient, std::size_t threads) {
  if (plan.fully_connected())
    return compute_dense_vjp(plan, variance_plan, x1, x2, cotangent, block, gradient, threads);
  const Index size = plan.image_size(), count = derivatives(plan);
  const Index per_round =
      std::min(x2.tiles(), tiles_per_round(tile_bytes<T>(plan) + x1.count * count * sizeof(T)));
  const LeftTables<T> left(plan, x1);
  Buffer<T> pieces(x1.count * per_round * count);
  Buffer<double> sums(x1.count * count);
  for_each_unit<PairEngine<T>>(
      plan, x1.count, x2, per_round, threads,
      [&](auto& engine, auto right, Index i, Index k, Index tile) {
        store_block<T>(engine.forward(left.image(i), right), i, tile, x2.count, block);
        engine.backward(left.image(i), right);
        const Weights<T> weights(cotangent, i, tile, x2.count);
        T* piece = pieces.data() + (i * per_round + k) * count;
        contract(lanes_of(engine.pixel_bar()), size, weights.values,
                 [&](Index e, double sum) { piece[e] = T(sum); });
        contract(lanes_of(engine.sigma()), plan.variances, weights.values,
                 [&](Index e, double sum) { piece[size + e] = T(sum); });
      },
      [&](Index tiles) {
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

// Sets block [A, B], and values [A, tiles, derivatives, lanes], from which `pull_back` forms a
// gradient once the cotangent is known. plan: of pairs.
template <class T>
void compute_derivatives(const Plan& plan, ImageSet<T> x1, ImageSet<T> x2, T* block, T* values,
                         std::size_t threads) {
  const Index size = plan.image_size(), count = derivatives(plan);
  const LeftTables<T> left(plan, x1);
  for_each_unit<PairEngine<T>>(
      plan, x1.count, x2, threads, [&](auto& engine, auto right, Index i, Index, Index tile) {
        store_block<T>(engine.forward(left.image(i), right), i, tile, x2.count, block);
        engine.backward(left.image(i), right);
        T* to = values + (i * x2.tiles() + tile) * count * kLanes<T>;
        std::memcpy(to, engine.pixel_bar().data(), size * kVectorBytes);
        std::memcpy(to + size * kLanes<T>, engine.sigma().data(), plan.variances * kVectorBytes);
      });
}

// Sets the gradient [A, H, W, D] by x1 for a cotangent [A, right_count], from the values of
// `compute_derivatives`.
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
