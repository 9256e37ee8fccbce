"""One XLA thread a tile, as in the programs: what makes bits independent of the machine's cores. Set before JAX starts."""

import os

os.environ['NPROC'] = '1'
