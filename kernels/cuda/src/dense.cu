// Fully-connected networks, whose readout is a dot product of images: docs/kernel.md, "The head".
// All in float64.
namespace kip {

// The mean product of x and y [kPixels], y's entries `stride` apart; in order, so that the
// covariance of identical images equals their variance to the bit.
inline double dot_product(const Real* x, const Real* y, long long stride) {
  double sum = 0;
  for (int e = 0; e < kPixels; ++e) sum += double(x[e]) * double(y[e * stride]);
  return sum / kPixels;
}

// Sets tables [count], the variances of images [count, H, W, D].
KIP_KERNEL(1) kip_dense_tables(const Real* images, double* tables, int count) {
  for_each_index(count, [&](long long image) {
    tables[image] = dot_product(images + image * kPixels, images + image * kPixels, 1);
  });
}

// Sets transposed [kPixels, count], in which neighbouring threads of the next kernel read
// neighbours.
KIP_KERNEL(1) kip_dense_transpose(const Real* images, Real* transposed, int count) {
  for_each_index((long long)count * kPixels,
                 [&](long long e) { transposed[e] = images[e % count * kPixels + e / count]; });
}

// Sets values [rows, columns], and derivatives [1 + kHidden, rows, columns] of each by n and by the
// left image's deviations, the latter times the deviation.
KIP_KERNEL(1)
kip_dense_block(const Real* __restrict__ left, const double* __restrict__ left_tables,
                const Real* __restrict__ right_transposed, const double* __restrict__ right_tables,
                int rows, int columns, Real* __restrict__ values,
                double* __restrict__ derivatives) {
  const long long pairs = (long long)rows * columns;
  for_each_index(pairs, [&](long long pair) {
    const long long i = pair / columns, j = pair % columns;
    const double n = dot_product(left + i * kPixels, right_transposed + j, columns);
    const Head head(n, 0, left_tables[i], right_tables[j]);
    values[pair] = Real(head.kernel);
    derivatives[pair] = head.n_bar;
    for (int l = 0; l < kHidden; ++l) derivatives[(1 + l) * pairs + pair] = head.sigma[l];
  });
}

// Sets variances_bar [rows], the cotangents of the left images' variances, given the block's
// cotangent [rows, columns].
KIP_KERNEL(1)
kip_dense_variances_vjp(const double* tables, const double* derivatives, const Real* cotangent,
                        int rows, int columns, double* variances_bar) {
  const long long pairs = (long long)rows * columns;
  for_each_index(rows, [&](long long i) {
    double q_bar = 0, q[kHidden + 1];
    for_each_hidden(tables[i], [&](int l, double value) { q[l] = value; });
    for (int l = kHidden - 1; l >= 0; --l) {
      double sum = 0;
      for (int j = 0; j < columns; ++j)
        sum += double(cotangent[i * columns + j]) * derivatives[(1 + l) * pairs + i * columns + j];
      q_bar = ((q[l] > 0 ? sum / (2 * q[l]) : 0) + q_bar / 2) * kWeight;
    }
    variances_bar[i] = q_bar;
  });
}

// Sets the gradient [rows, H, W, D] by the left images.
KIP_KERNEL(1)
kip_dense_vjp(const Real* __restrict__ left, const Real* __restrict__ right,
              const double* __restrict__ derivatives, const Real* __restrict__ cotangent,
              const double* __restrict__ variances_bar, int rows, int columns,
              double* __restrict__ gradient) {
  for_each_index((long long)rows * kPixels, [&](long long e) {
    const long long i = e / kPixels;
    double sum = 2 * variances_bar[i] * left[e];
    for (int j = 0; j < columns; ++j)
      sum += double(cotangent[i * columns + j]) * derivatives[i * columns + j] *
             double(right[(long long)j * kPixels + e % kPixels]);
    gradient[e] = sum / kPixels;
  });
}

}  // namespace kip
