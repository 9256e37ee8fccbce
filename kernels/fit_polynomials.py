"""Fits the polynomials that `band/layers.py` uses in float32 in place of acos.

Run it to print them: `python -m kernels.fit_polynomials`.

With r = 1 - |c|, both functions below are smooth on [0, 1]; their square-root factors are
multiplied back by the caller.
"""

from collections.abc import Callable

import numpy as np

DEGREE = 6


def angle(r: np.ndarray) -> np.ndarray:
  """acos(1 - r) / (2π √r)."""
  return 2 * np.arcsin(np.sqrt(r / 2)) / (2 * np.pi * np.sqrt(r))


def excess(r: np.ndarray) -> np.ndarray:
  """(√(1 - u²) - u acos(u)) / (2π r √r), u = 1 - r, by its series where the difference cancels."""
  u = 1 - r
  direct = (np.sqrt(r * (2 - r)) - u * 2 * np.arcsin(np.sqrt(r / 2))) / (2 * np.pi * r * np.sqrt(r))
  # d/dr (√(1 - u²) - u acos u) = acos(1 - r), whose series is √(2r) Σ a_k r^k.
  a, series = 1.0, 0.0
  for k in range(30):
    series += a * r**k / (k + 1.5)
    a *= (2 * k + 1) ** 2 / (4 * (k + 1) * (2 * k + 3))
  return np.where(r < 0.1, np.sqrt(2) / (2 * np.pi) * series, direct)


def minimax(function: Callable[[np.ndarray], np.ndarray], degree: int) -> tuple[np.ndarray, float]:
  """The best polynomial on [0, 1], by Remez exchange on a dense grid.

  Returns:
    its coefficients, highest power first, and its largest error.
  """
  grid = (1 - np.cos(np.pi * np.linspace(1e-3, 1, 20001))) / 2
  values = function(grid)
  nodes = np.round(np.linspace(0, len(grid) - 1, degree + 2)).astype(int)
  signs = (-1.0) ** np.arange(degree + 2)
  for _ in range(30):
    solution = np.linalg.solve(
      np.column_stack([np.vander(grid[nodes], degree + 1), signs]), values[nodes]
    )
    error = np.polyval(solution[:-1], grid) - values
    pieces = np.split(np.arange(len(grid)), np.nonzero(np.diff(np.sign(error)))[0] + 1)
    extrema = [piece[np.argmax(np.abs(error[piece]))] for piece in pieces]
    if len(extrema) != degree + 2:
      break
    nodes = np.array(extrema)
  return solution[:-1], float(np.abs(error).max())


if __name__ == '__main__':
  for f in (angle, excess):
    coefficients, worst = minimax(f, DEGREE)
    values = ', '.join(f'{c:.9e}' for c in coefficients)
    print(f'{f.__name__}: ({values}), largest error {worst:.1e}')
