"""Fits the polynomial of the arc-cosine kernels: `python -m kernels.native.fit`.

Prints src/arc_cosine_coefficients.h, for `clang-format --assume-filename=x.h` to break its lines.

Both kernels of a ReLU layer (Cho and Saul 2009) need acos(c) and sqrt(1 - c^2). With one square
root s = sqrt(1 - c^2) / pi,

    acos(c) / 2 pi = s * p(c),    p(c) = acos(c) / (2 sqrt(1 - c^2)),    0 <= c <= 1,

where p is analytic (its singularity is at -1), so that interpolation at Chebyshev points converges
by a factor 5.8 a degree. The error of p itself must be rounding, not only that of s * p: near c = 1
it is what half squared distances are good to.
"""

import numpy as np

DEGREES = {'float': 8, 'double': 22}

_HEADER = """\
// Written by fit.py: p(c) = acos(c) / (2 sqrt(1 - c^2)), 0 <= c <= 1; do not edit.
#pragma once

namespace kip {

template <class T>
struct ArcCosine;
"""
_STRUCT = """
// Degree {degree} in {variable}; largest error: {error:.1e}.
template <>
struct ArcCosine<{scalar}> {{
  static constexpr {scalar} powers[] = {{{values}}};
}};
"""


def p(c: np.ndarray) -> np.ndarray:
  """acos(c) / (2 sqrt(1 - c^2)), to rounding also near c = 1."""
  return np.arcsin(np.sqrt((1 - c) / 2)) / np.sqrt((1 - c) * (1 + c))


def fit(degree: int) -> tuple[np.ndarray, float]:
  """Coefficients in powers of z = 2c - 1, lowest first, and the largest error of p."""
  series = np.polynomial.chebyshev.chebinterpolate(lambda z: p((1 + z) / 2), degree)
  z = np.linspace(-1, 1, 10001)[:-1]
  error = np.abs(np.polynomial.chebyshev.chebval(z, series) - p((1 + z) / 2)).max()
  return np.polynomial.chebyshev.cheb2poly(series), error


def main():
  header = _HEADER
  for scalar, degree in DEGREES.items():
    powers, error = fit(degree)
    if scalar == 'float':
      # In powers of (1 - c) / pi; double keeps 2c - 1, whose coefficients decay.
      powers = np.polynomial.Polynomial(powers)(np.polynomial.Polynomial([1, -2 * np.pi])).coef
      variable, form = '(1 - c) / pi', '{:.9g}f'
    else:
      variable, form = '2c - 1', '{:.17g}'
    values = ', '.join(map(form.format, powers))
    header += _STRUCT.format(
      degree=degree, variable=variable, error=error, scalar=scalar, values=values
    )
  print(header + '\n}  // namespace kip')


if __name__ == '__main__':
  main()
