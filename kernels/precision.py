"""Switches JAX's float64 on: every module that uses JAX imports this first, so that every process agrees.

Kernels cast explicitly; float64 is for the coordinator's state and for checks.
"""

import jax

jax.config.update('jax_enable_x64', True)
