// A network as the C++ sees it: levels of decreasing resolution, the offsets each one needs, a
// readout, hidden layers.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "memory.h"

namespace kip {

struct Network {
  std::vector<std::int64_t> convs;  // 3x3 convolutions (with ReLU) at each resolution; a 2x2
                                    // pooling lies between two entries
  bool all_offsets;                 // global average pooling; else Flatten
  int hidden;                       // Dense + ReLU layers after the readout
  bool nngp;                        // the kernel is the NNGP; else the NTK
  double w, b;                      // W_std^2 and b_std^2
};

struct Offset {
  int dy, dx;
};

// The pixels y of the first image for which y + d exists, in the coordinates of the first image.
struct Rectangle {
  int y, x, height, width;
};

// One resolution. Its covariances n[d, y] = cov(x1[y], x2[y + d]) are kept for |dy| <= radius_y and
// |dx| <= radius_x.
struct Level {
  int height, width, convs, radius_y, radius_x;
  Index first_variance;  // of the table of variances: the first ReLU's
  bool has_ntk;          // whether a convolution lies before this level: the NTK is zero until then
  bool distances;  // whether a ReLU lies here or after: covariances are then held as half squared
                   // distances, see lines.h
  Index first_pooled;  // of the table of pooled values: [2, pixels], after a pooling to distances
  std::vector<Index> starts;  // where each offset's rectangle starts, rows of width + 1 (a zero
                              // column follows each row)
  Index size;                 // of all rectangles together

  Rectangle rectangle(Offset d) const {
    return {std::max(0, -d.dy), std::max(0, -d.dx), height - std::abs(d.dy),
            width - std::abs(d.dx)};
  }
  Index start(Offset d) const {
    return starts[(d.dy + radius_y) * (2 * radius_x + 1) + d.dx + radius_x];
  }
  int pixels() const { return height * width; }
  bool contains(int y, int x) const { return y >= 0 && y < height && x >= 0 && x < width; }

  template <class F>
  void for_each_offset(F f) const {
    for (int dy = -radius_y; dy <= radius_y; ++dy)
      for (int dx = -radius_x; dx <= radius_x; ++dx) f(Offset{dy, dx});
  }
};

struct Plan {
  Network network;
  int pixels, channels;
  std::vector<Level> levels;  // input side first
  Index variances;  // ReLU inputs per image: those of convolutions, of which the table has the
                    // variances; then hidden layers'
  Index pooled;     // how many the table of pooled values has
  int max_convs, max_width;

  Index image_size() const { return Index(pixels) * channels; }
  Index convolution_variances() const { return variances - network.hidden; }
  Index table() const { return convolution_variances() + pooled; }  // both tables, as they are kept
  bool distances_to_readout() const { return network.hidden > 0; }  // what the readout reads
  // No convolution, no pooling, no offsets: the readout is a dot product of images.
  bool fully_connected() const {
    return !network.all_offsets && network.convs.size() == 1 && !network.convs[0];
  }
  double readout_share() const {  // of each entry of the last level, which is doubled, in the mean
    const double count = levels.back().pixels();
    return 0.5 / (network.all_offsets ? count * count : count);
  }
  double dot_product_share() const { return 1.0 / image_size(); }  // of a product of two values
  double convolution_scale() const { return network.w / 9; }
};

// pair: the offsets that the kernel of two images depends on; otherwise those that the variances of
// one image do.
inline Plan make_plan(const Network& network, int height, int width, int channels, bool pair) {
  Plan plan{network, height * width, channels, {}, 0, 0, 0, width};
  const int count = static_cast<int>(network.convs.size());
  for (int p = 0; p < count; ++p) {
    Level level{height >> p, width >> p, static_cast<int>(network.convs[p]),
                -1,          -1,         plan.variances,
                false,       false,      plan.pooled,
                {},          0};
    level.has_ntk = p > 0 && (plan.levels[p - 1].has_ntk || plan.levels[p - 1].convs > 0);
    level.distances =
        plan.distances_to_readout() || std::any_of(network.convs.begin() + p, network.convs.end(),
                                                   [](std::int64_t convs) { return convs > 0; });
    plan.variances += Index(level.convs) * level.pixels();
    if (p && level.distances) plan.pooled += 2 * level.pixels();
    plan.max_convs = std::max(plan.max_convs, level.convs);
    plan.levels.push_back(level);
  }
  plan.variances += network.hidden;

  // The last ReLU reads variances at offset 0 only, and nothing after it needs any.
  int last = count - 1;
  if (!pair && !network.hidden)
    while (last >= 0 && !plan.levels[last].convs) --last;
  const bool everything = network.all_offsets && (pair || network.hidden);
  for (int p = last; p >= 0; --p) {
    Level& level = plan.levels[p];
    level.radius_y = p < last     ? std::min(2 * plan.levels[p + 1].radius_y + 1, level.height - 1)
                     : everything ? level.height - 1
                                  : 0;
    level.radius_x = p < last     ? std::min(2 * plan.levels[p + 1].radius_x + 1, level.width - 1)
                     : everything ? level.width - 1
                                  : 0;
    level.for_each_offset([&](Offset d) {
      level.starts.push_back(level.size);
      const Rectangle r = level.rectangle(d);
      level.size += Index(r.height) * (r.width + 1);
    });
  }
  plan.levels.resize(std::max(last + 1, 0));
  return plan;
}

}  // namespace kip
