// Blocks of the kernel and tables of images. A block of threads takes one pair (or image) at a
// time, and has a workspace of its own [kWorkspace].
//
// Layouts, by plan.py. An image's table [kTable]: its pixels, a plane a channel; then, for each
// level, the deviations (q / 2)^1/2 of each ReLU's input, and where m is held, half of the q that
// enters the level and, after a pooling, half of the spread. Readouts [2]: variance and spread of
// what the readout reads, where there are hidden layers. A pair's derivatives [kDerivatives]: by
// the first image's pixels, then by its deviations and hidden variances, each times the deviation.
namespace kip {

// A block's shared memory; what the plan finds no room for there lies in the workspace.
struct Shared {
  double *sums, *seeds;  // [2 kThreads], [2]
  Real* exchange;        // [kExchangeSize], the planes of Sweep
  Real* table;           // [kTable], with margins

  Shared(double* shared, Real* workspace) : sums(shared), seeds(shared + 2 * kThreads) {
    exchange = kExchangeShared ? reinterpret_cast<Real*>(shared + 2 * kThreads + 2)
                               : workspace + kWorkspace - kExchangeSize;
    table = exchange + kExchangeSize + kMargin;
  }

  // The second image's table, which every offset reads: a copy in shared memory, if there is room.
  const Real* hold(const Real* right) const {
    if constexpr (kTableShared) {
      for (int e = thread() - kMargin; e < kTable + kMargin; e += kThreads) table[e] = right[e];
      sync();
      return table;
    } else {
      return right;
    }
  }

  // Replaces thread 0's a and b by the sums over the first kCount threads, in a fixed order.
  template <int kCount>
  void add_up(double& a, double& b) const {
    sums[2 * thread()] = a, sums[2 * thread() + 1] = b;
    sync();
    if (thread()) return;
    a = b = 0;
    for (int k = 0; k < kCount; ++k) a += sums[2 * k], b += sums[2 * k + 1];
  }

  // Replaces all threads' a and b by thread 0's.
  void broadcast(double& a, double& b) const {
    if (!thread()) seeds[0] = a, seeds[1] = b;
    sync();
    a = seeds[0], b = seeds[1];
  }
};

// Levels p and above of a pair; sets the readout's sums of n (or m) and t, for thread 0.
template <int p>
inline void pair_forward(const Real* left, const Real* right, const Shared& shared, Real* bands,
                         double& n, double& t) {
  if constexpr (p < kPairCount) {
    using Level = Sweep<false, p>;
    Level sweep(left, right, shared.exchange, bands);
    sweep.forward();
    if constexpr (Level::kLast) {
      n = sweep.n_sum, t = sweep.t_sum;
      shared.add_up<Level::kBusy>(n, t);
    } else {
      pair_forward<p + 1>(left, right, shared, bands, n, t);
    }
  }
}

// The adjoint of levels p and below, given the cotangents of the last level's outputs. Requires the
// bands as `pair_forward` left them; stores the pair's derivatives.
template <int p>
inline void pair_backward(const Real* left, const Real* right, const Shared& shared, Real* bands,
                          Real n_bar, Real t_bar, Real* derivatives) {
  if constexpr (p >= 0) {
    {
      Sweep<false, p> sweep(left, right, shared.exchange, bands);
      sweep.backward(n_bar, t_bar);
      sweep.store(derivatives);
    }
    pair_backward<p - 1>(left, right, shared, bands, n_bar, t_bar, derivatives);
  }
}

// The covariance n at the readout, given the mean m of what it reads, spreads included, and both
// images' readouts [2].
inline double covariance(double m, const double* left, const double* right) {
  const double spreads = left[1] + right[1], variances = left[0] + right[0];
  m -= spreads / 2;
  return variances / 2 -
         (m < double(kRounding<Real>) / 4 * square_root(spreads * (spreads + variances)) ? 0 : m);
}

// Sets values [rows, columns] for all pairs i, j of left and right images (tables, readouts) but
// those with j < i - diagonal; and, if kBackward, derivatives [rows, columns, kDerivatives].
template <bool kBackward>
inline void for_each_pair(const Real* left, const double* left_readouts, const Real* right,
                          const double* right_readouts, int rows, int columns, int diagonal,
                          Real* values, Real* derivatives, Real* workspace, double* memory) {
  Real* bands = workspace + block() * kWorkspace;
  const Shared shared(memory, bands);
  for (long long unit = block(); unit < (long long)rows * columns; unit += blocks()) {
    const int i = int(unit / columns), j = int(unit % columns);
    if (j < i - diagonal) continue;
    const Real *x1 = left + (long long)i * kTable, *x2 = right + (long long)j * kTable,
               *held = shared.hold(x2);
    double n = 0, t = 0;
    pair_forward<0>(x1, held, shared, bands, n, t);
    if (!thread()) {  // the others may hold the next pair's table already
      const double *readout1 = left_readouts + 2 * i, *readout2 = right_readouts + 2 * j;
      n *= kReadoutShare, t *= kReadoutShare;
      if (kHidden) n = covariance(n, readout1, readout2);
      const Head head(n, t, readout1[0], readout2[0]);
      values[unit] = Real(head.kernel);
      n = head.n_bar * kReadoutShare, t = head.t_bar * kReadoutShare;
      if constexpr (kBackward)
        for (int l = 0; l < kHidden; ++l)
          derivatives[unit * kDerivatives + kDerivatives - kHidden + l] = Real(head.sigma[l]);
    }
    if constexpr (kBackward) {
      shared.broadcast(n, t);
      pair_backward<kPairCount - 1>(x1, held, shared, bands, Real(n), Real(t),
                                    derivatives + unit * kDerivatives);
    }
  }
}

// Levels p and above of an image with itself, which fill its table; sets the readout's sums of m
// and of the variances, for thread 0.
template <int p>
inline void self_forward(Real* table, const Shared& shared, Real* bands, double& m, double& q) {
  if constexpr (p < kSelfCount) {
    using Level = Sweep<true, p>;
    Level sweep(table, table, shared.exchange, bands);
    sweep.forward_self(table, bands + kDiagonals);
    if constexpr (Level::kLast) {
      m = sweep.n_sum, q = sweep.t_sum;
      shared.add_up<Level::kBusy>(m, q);
    } else {
      self_forward<p + 1>(table, shared, bands, m, q);
    }
  }
}

// The adjoint of levels p and below, given the cotangent of the readout's entries and those of the
// deviations, each times the deviation, in `sums` [kDerivatives]; adds to gradient [D planes].
template <int p>
inline void self_backward(const Real* table, const Shared& shared, Real* bands, Real n_bar,
                          const double* sums, double* gradient) {
  if constexpr (p >= 0) {
    {
      Sweep<true, p> sweep(table, table, shared.exchange, bands);
      sweep.backward_self(n_bar, sums);
      if constexpr (p == 0) sweep.add_pixels(gradient);
    }
    self_backward<p - 1>(table, shared, bands, n_bar, sums, gradient);
  }
}

// Sets tables [count, kTable] and readouts [count, 2] of images [count, H, W, D].
KIP_KERNEL(kBackwardBlocks)
kip_tables(const Real* images, Real* tables, double* readouts, int count, Real* workspace) {
  KIP_SHARED(memory);
  Real* bands = workspace + block() * kWorkspace;
  const Shared shared(memory, bands);
  for (int image = block(); image < count; image += blocks()) {
    const Real* pixels = images + (long long)image * kHeight * kWidth * kChannels;
    Real* table = tables + (long long)image * kTable;
    for (int e = thread(); e < kHeight * kWidth; e += kThreads) {
      Real* to = table + at(kWidth, e / kWidth, e % kWidth);
      for (int c = 0; c < kChannels; ++c)
        to[c * plane_size(kHeight, kWidth)] = pixels[e * kChannels + c];
    }
    sync();
    double m = 0, q = 0;
    self_forward<0>(table, shared, bands, m, q);
    if (!thread()) {  // as after a pooling
      const double spread = m * kReadoutShare;
      readouts[2 * image] = q / kReadoutPixels - spread, readouts[2 * image + 1] = spread;
    }
    sync();
  }
}

// Sets values [rows, columns], but for those with j < i - diagonal.
KIP_KERNEL(kForwardBlocks)
kip_block(const Real* __restrict__ left, const double* __restrict__ left_readouts,
          const Real* __restrict__ right, const double* __restrict__ right_readouts, int rows,
          int columns, int diagonal, Real* __restrict__ values, Real* __restrict__ workspace) {
  KIP_SHARED(memory);
  for_each_pair<false>(left, left_readouts, right, right_readouts, rows, columns, diagonal, values,
                       nullptr, workspace, memory);
}

// Sets values [rows, columns] and derivatives [rows, columns, kDerivatives].
KIP_KERNEL(kBackwardBlocks)
kip_derivatives(const Real* __restrict__ left, const double* __restrict__ left_readouts,
                const Real* __restrict__ right, const double* __restrict__ right_readouts, int rows,
                int columns, Real* __restrict__ values, Real* __restrict__ derivatives,
                Real* __restrict__ workspace) {
  KIP_SHARED(memory);
  for_each_pair<true>(left, left_readouts, right, right_readouts, rows, columns, rows, values,
                      derivatives, workspace, memory);
}

// Adds sum_j cotangent[i, j] derivatives[i, j] to sums [rows, kDerivatives]: j in order, whatever
// part of a block this is.
KIP_KERNEL(1)
kip_contract(const Real* __restrict__ derivatives, const Real* __restrict__ cotangent, int rows,
             int columns, double* __restrict__ sums) {
  for_each_index((long long)rows * kDerivatives, [&](long long e) {
    const long long i = e / kDerivatives;
    const Real* from = derivatives + i * columns * kDerivatives + e % kDerivatives;
    double sum = sums[e];
#pragma unroll 8
    for (int j = 0; j < columns; ++j)
      sum += double(cotangent[i * columns + j]) * double(from[j * (long long)kDerivatives]);
    sums[e] = sum;
  });
}

// Sets gradient [count, D planes], given sums [count, kDerivatives] of derivatives times
// cotangents: adds the part through the tables.
KIP_KERNEL(1)
kip_tables_vjp(Real* tables, const double* readouts, const double* sums, double* gradient,
               int count, Real* workspace) {
  KIP_SHARED(memory);
  Real* bands = workspace + block() * kWorkspace;
  const Shared shared(memory, bands);
  for (int image = block(); image < count; image += blocks()) {
    Real* table = tables + (long long)image * kTable;
    const double* from = sums + (long long)image * kDerivatives;
    double* to = gradient + (long long)image * kPixels;
    for (int e = thread(); e < kPixels; e += kThreads) to[e] = from[e];
    double unused[2], hidden[kHidden + 1], n_bar = 0;
    self_forward<0>(table, shared, bands, unused[0], unused[1]);
    for_each_hidden(readouts[2 * image], [&](int l, double q) { hidden[l] = q; });
    for (int l = kHidden - 1; l >= 0; --l)
      n_bar =
          ((hidden[l] > 0 ? from[kDerivatives - kHidden + l] / (2 * hidden[l]) : 0) + n_bar / 2) *
          kWeight;
    sync();
    self_backward<kSelfCount - 1>(table, shared, bands, Real(n_bar * kReadoutShare), from, to);
    sync();
  }
}

}  // namespace kip
