"""JAX's settings for the whole process. Every module that uses JAX imports this one first.

float64 is on: kernels cast explicitly, the coordinator's state and checks use it. CPU computations
run in the Python thread that calls them: dispatched asynchronously, they queue for a pool of NPROC
threads, and with NPROC=1 the kernels' tiles would wait for each other.
"""

import jax

jax.config.update('jax_enable_x64', True)
jax.config.update('jax_cpu_enable_async_dispatch', False)
