"""Fits the polynomial of the arc-cosine kernels; prints src/arc_cosine_coefficients.h (python -m kernels.native.fit > that file).

Both kernels of a ReLU layer need acos(c) and sqrt(1 - c^2). With one square root s = sqrt(1 - c^2),

    acos(|c|) / 2 pi = s * p(|c|),    p(a) = acos(a) / (2 pi sqrt(1 - a^2)),

where p is analytic on [0, 1] (its singularity is at -1), so that a polynomial converges by a factor 5.8 a degree. What matters is the
error of the product, s * (p - fit): it is made minimax by iteratively re-weighted least squares (Lawson's algorithm).
"""

import textwrap

import numpy as np

DEGREES = {'float': 7, 'double': 22}


def p(a: np.ndarray) -> np.ndarray:
  """acos(a) / (2 pi sqrt(1 - a^2)), to rounding also near a = 1."""
  return 2 * np.arcsin(np.sqrt((1 - a) / 2)) / np.sqrt((1 - a) * (1 + a)) / (2 * np.pi)


def fit(degree: int, points: int = 4000, iterations: int = 400) -> tuple[np.ndarray, float]:
  """Coefficients in powers of (2a - 1), lowest first, and the largest error of s * p."""
  a = (1 - np.cos(np.linspace(0, np.pi, points + 2)[1:-1])) / 2
  sine, basis, weights = np.sqrt((1 - a) * (1 + a)), np.polynomial.chebyshev.chebvander(2 * a - 1, degree), np.full(points, 1 / points)
  best = (None, np.inf)
  for _ in range(iterations):
    scale = np.sqrt(weights) * sine
    series = np.linalg.lstsq(basis * scale[:, None], p(a) * scale, rcond=None)[0]
    error = np.abs(basis @ series - p(a)) * sine
    if error.max() < best[1]:
      best = (series, error.max())
    weights = weights * (error + 1e-18)
    weights /= weights.sum()
  return np.polynomial.chebyshev.cheb2poly(best[0]), best[1]


def main():
  print('// Written by fit.py: p(a) = acos(a) / (2 pi sqrt(1 - a^2)) on [0, 1]; do not edit.\n#pragma once\n\nnamespace kip {\n')
  print('template <class T>\nstruct ArcCosine;\n')
  for scalar, degree in DEGREES.items():
    powers, error = fit(degree)
    if scalar == 'float':  # in powers of a; double keeps 2a - 1, whose coefficients decay
      powers = np.polynomial.Polynomial(powers, domain=[0, 1], window=[-1, 1]).convert(domain=[-1, 1], window=[-1, 1]).coef
    variable = 'a' if scalar == 'float' else '2a - 1'
    print(f'// Degree {degree} in {variable}; largest error of sqrt(1 - a^2) p(a): {error:.1e}.')
    suffix = 'f' if scalar == 'float' else ''
    values = ', '.join(f'{c:.9g}{suffix}' if suffix else f'{c:.17g}' for c in powers)
    lines = textwrap.fill(values, 138, initial_indent=' ' * 6, subsequent_indent=' ' * 6)
    print(f'template <>\nstruct ArcCosine<{scalar}> {{\n  static constexpr {scalar} powers[] = {{\n{lines}}};\n}};\n')
  print('}  // namespace kip')


if __name__ == '__main__':
  main()
