"""How this process compiles."""

import contextlib
from collections.abc import Iterator

import jax

# LLVM's optimisations would be half of the time of tests that compile; without them a result
# differs by a rounding or so.
jax.config.update('jax_disable_most_optimizations', True)


@contextlib.contextmanager
def as_for_users() -> Iterator[None]:
  """Compiles with LLVM's optimisations inside, as the processes that tests start do.

  For tests where roundings count, or that compute for longer than they compile.
  """
  jax.clear_caches()  # of functions that are compiled in the other way
  jax.config.update('jax_disable_most_optimizations', False)
  try:
    yield
  finally:
    jax.config.update('jax_disable_most_optimizations', True)
    jax.clear_caches()
