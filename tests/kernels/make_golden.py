"""Writes golden.npz: every case by Neural Tangents in float64.

Run `NPROC=1 PYTHONPATH=. python tests/kernels/make_golden.py`.
"""

import pathlib

import kernel_cases
import numpy as np

from kernels import registry

PATH = pathlib.Path(__file__).with_name('golden.npz')


def main():
  golden = {}
  for name, case in kernel_cases.CASES.items():
    kernel = registry.make_kernel(case.architecture, implementation='reference', dtype='float64')
    golden[f'{name}/block'], golden[f'{name}/gradient'] = kernel.block_vjp(
      *kernel_cases.images(case)
    )
    if name in kernel_cases.NNGP:
      nngp = registry.make_kernel(
        case.architecture, implementation='reference', dtype='float64', kind='nngp'
      )
      golden[f'{name}/nngp_block'], golden[f'{name}/nngp_gradient'] = nngp.block_vjp(
        *kernel_cases.images(case._replace(images='random'))
      )
    print(name, case.shape, flush=True)
  np.savez_compressed(PATH, **golden)


if __name__ == '__main__':
  main()
