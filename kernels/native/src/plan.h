// A network as the C++ sees it: levels of decreasing resolution and the offsets that each one
// needs: docs/kernel.md, "The band".
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "memory.h"

namespace kip {

struct Network {
  std::vector<std::int64_t> convs;  // 3x3 convolutions (with ReLU) of each level; a pooling between
  bool all_offsets;                 // global average pooling; else Flatten
  int hidden;                       // Dense + ReLU layers after the readout
  bool nngp;                        // the kernel is the NNGP; else the NTK
  double w, b;                      // w_std^2 and b_std^2
};

struct Offset {
  int dy, dx;
};

// The pixels y of the first image for which y + d exists, in the coordinates of the first image.
struct Rectangle {
  int y, x, height, width;
};

// One resolution, whose covariances n[d, y] = cov(x1[y], x2[y + d]) are wanted for |dy| <= radius_y
// and |dx| <= radius_x.
struct Level {
  int height, width, convs;
  Index first_variance;    // in an image's variances: this level's [convs, height, width]
  Index first_pooled;      // in its pooled values: [spread or q, height, width], if p and distances
  bool has_ntk = false;    // whether a convolution lies before: until then t = 0
  bool distances = false;  // whether a ReLU lies here or after: m is held, not n
  int radius_y = -1, radius_x = -1;
  // Where each offset's rectangle starts in a band; a row has width + 1 entries, the last one 0.
  std::vector<Index> starts = {};
  Index size = 0;  // of a band

  Rectangle rectangle(Offset d) const {
    return {std::max(0, -d.dy), std::max(0, -d.dx), height - std::abs(d.dy),
            width - std::abs(d.dx)};
  }
  Index start(Offset d) const {
    return starts[(d.dy + radius_y) * (2 * radius_x + 1) + d.dx + radius_x];
  }
  int pixels() const { return height * width; }

  // Calls f(d) for each offset that is held, in the order of `starts`.
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
  Index variances;            // ReLU inputs of an image: those of convolutions, then hidden layers'
  Index pooled;               // pooled values of an image
  int max_convs, max_width;

  Index image_size() const { return Index(pixels) * channels; }
  Index convolution_variances() const { return variances - network.hidden; }

  // Numbers in an image's table: variances of convolutions, then pooled values.
  Index table() const { return convolution_variances() + pooled; }

  // Whether the readout reads m, not n.
  bool distances_to_readout() const { return network.hidden > 0; }

  // No convolution, pooling or offset: the readout is a dot product of images.
  bool fully_connected() const {
    return !network.all_offsets && network.convs.size() == 1 && !network.convs[0];
  }

  // The share in the readout's mean of each entry of the last level, which is doubled.
  double readout_share() const {
    const double count = levels.back().pixels();
    return 0.5 / (network.all_offsets ? count * count : count);
  }

  double dot_product_share() const { return 1.0 / image_size(); }
  double convolution_scale() const { return network.w / 9; }
};

// The plan for images [height, width, channels], which must leave a pixel at every level. pair:
// with the offsets that the kernel of two images depends on; else with those that variances depend
// on, and without the levels after the last ReLU.
inline Plan make_plan(const Network& network, int height, int width, int channels, bool pair) {
  Plan plan{network, height * width, channels, {}, 0, 0, 0, width};
  const int count = static_cast<int>(network.convs.size());
  for (int p = 0; p < count; ++p) {
    Level level{height >> p, width >> p, static_cast<int>(network.convs[p]), plan.variances,
                plan.pooled};
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

  // Variances end at the last ReLU, which reads them at offset 0 only.
  int last = count - 1;
  if (!pair && !network.hidden)
    while (last >= 0 && !plan.levels[last].convs) --last;
  const bool everything = network.all_offsets && (pair || network.hidden);
  for (int p = last; p >= 0; --p) {
    Level& level = plan.levels[p];
    const auto radius = [&](int Level::* axis, int size) {
      if (p == last) return everything ? size - 1 : 0;
      return std::min(2 * (plan.levels[p + 1].*axis) + 1, size - 1);
    };
    level.radius_y = radius(&Level::radius_y, level.height);
    level.radius_x = radius(&Level::radius_x, level.width);
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
