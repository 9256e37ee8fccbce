"""Fits the polynomial of the arc-cosine kernels; prints src/arc_cosine_coefficients.h (python -m
kernels.native.fit | clang-format --assume-filename=x.h > that file).

Both kernels of a ReLU layer need acos(c) and sqrt(1 - c^2). With one square root s = sqrt(1 - c^2)
/ pi,

    acos(c) / 2 pi = s * p(c),    p(c) = acos(c) / (2 sqrt(1 - c^2)),    0 <= c <= 1,

where p is analytic (its singularity is at -1), so that interpolation at Chebyshev points converges
by a factor 5.8 a degree. The error of p itself must be rounding, not only that of s * p: near c = 1
it is what half squared distances are good to.
"""

import numpy as np

DEGREES = {'float': 8, 'double': 22}


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
  print(
    '// Written by fit.py: p(c) = acos(c) / (2 sqrt(1 - c^2)), 0 <= c <= 1; do not edit.\n#pragma once\n\nnamespace kip {\n'
  )
  print('template <class T>\nstruct ArcCosine;\n')
  for scalar, degree in DEGREES.items():
    powers, error = fit(degree)
    if scalar == 'float':
      # In powers of (1 - c) / pi; double keeps 2c - 1, whose coefficients decay.
      powers = np.polynomial.Polynomial(powers)(np.polynomial.Polynomial([1, -2 * np.pi])).coef
    variable = '(1 - c) / pi' if scalar == 'float' else '2c - 1'
    print(f'// Degree {degree} in {variable}; largest error: {error:.1e}.')
    suffix = 'f' if scalar == 'float' else ''
    values = ', '.join(f'{c:.9g}{suffix}' if suffix else f'{c:.17g}' for c in powers)
    print(
      f'template <>\nstruct ArcCosine<{scalar}> {{\n  static constexpr {scalar} powers[] = {{{values}}};\n}};\n'
    )
  print('}  // namespace kip')


if __name__ == '__main__':
  main()
