"""A slow and independent NTK, for small images."""

import numpy as np


def dense_ntk(architecture, x1, x2) -> float:
  """The NTK of a pair of images [H, W, D] from all pixel pairs.

  In long double, where identical pixels correlate to exactly 1.
  """
  x1, x2 = np.asarray(x1, np.longdouble), np.asarray(x2, np.longdouble)
  weight, bias = np.longdouble(architecture.w_std) ** 2, np.longdouble(architecture.b_std) ** 2
  pairs = ((x1, x2), (x1, x1), (x2, x2))
  n = [np.einsum('abd,efd->abef', x, y) / x1.shape[-1] for x, y in pairs]
  t = np.zeros_like(n[0])

  def box(v):
    v = np.pad(v, 1)
    size = [m - 2 for m in v.shape]
    return (
      sum(
        v[i : i + size[0], j : j + size[1], i : i + size[2], j : j + size[3]]
        for i in range(3)
        for j in range(3)
      )
      / 9
    )

  def mean_pool(v):
    h, w = v.shape[0] // 2, v.shape[1] // 2
    return v[: 2 * h, : 2 * w, : 2 * h, : 2 * w].reshape(h, 2, w, 2, h, 2, w, 2).mean((1, 3, 5, 7))

  def relu(n, t):
    q = [np.einsum('abab->ab', v) for v in n[1:]]
    q = ((q[0], q[1]), (q[0], q[0]), (q[1], q[1]))
    for i, (p, r) in enumerate(q):
      s = np.sqrt(p[:, :, None, None] * r)
      c = n[i] / np.where(s > 0, s, 1)
      c = np.where(1 - np.abs(c) < 1e-17, np.sign(c), c)
      dot = 1 - np.arccos(c) / np.longdouble('3.14159265358979323846')
      t = t * dot / 2 if i == 0 else t
      n = (
        n[:i]
        + [s * (np.sqrt(1 - c * c) / np.longdouble('3.14159265358979323846') + c * dot) / 2]
        + n[i + 1 :]
      )
    return n, t

  for stage in architecture.stages:
    for _ in range(stage.convs):
      n = [weight * box(v) + bias for v in n]
      n, t = relu(n, weight * box(t) + n[0])
    if stage.pool:
      n, t = [mean_pool(v) for v in n], mean_pool(t)

  def read(v):
    return (
      v.mean()
      if architecture.readout == 'global_average_pool'
      else np.einsum('abab->', v) / (v.shape[0] * v.shape[1])
    )

  n, t = [read(v).reshape(1, 1, 1, 1) for v in n], read(t).reshape(1, 1, 1, 1)
  for _ in range(architecture.hidden):
    n = [weight * v + bias for v in n]
    n, t = relu(n, weight * t + n[0])
  return float((weight * (n[0] + t) + bias).item())
