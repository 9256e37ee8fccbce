"""The NTK in pure JAX, exact, by offsets between pixels: docs/kernel.md derives it.

`offsets` says which offsets are held, `layers` takes one offset through a resolution, `sweep` all
of them and back, `variances` gives what an image needs on its own, `tile` is a whole network on
some pairs of images, and `kernel` cuts blocks into tiles.

Letters: rows and columns `y` [R, Q] of one resolution, pairs of images last (`[..., a, b]`: a of
x1, b of x2; `[..., N]` for an image with itself); n the NNGP, t the NTK, q an image's own
variances, s = √q its deviations, m = (q1 + q2) / 2 - n half a squared distance, of which n is
computed up to the last ReLU. Equations: NTK parameterisation of Neural Tangents (Novak et al.
2020, https://arxiv.org/abs/1912.02803).
"""
