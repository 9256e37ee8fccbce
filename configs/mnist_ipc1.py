"""KIP, ConvNet kernel, MNIST, 1 image a class.

Published by Nguyen et al. 2021b (NeurIPS, https://arxiv.org/abs/2107.13034), Table 1: test accuracy
KRR 96.5 %, finite network (width 1024, 5000 updates) 90.1 %.

    python launch.py --config=configs/mnist_ipc1.py --workdir=runs/mnist_ipc1

Measured on 2 cores of an Intel Xeon: KRR 94.58 % at step 950 (22 minutes) with 500 targets a step,
without augmentation; RESULTS.md has the curve and the command. To convergence, and on a GPU: not
measured.
"""

from configs import kip_convnet


def get_config():
  return kip_convnet.get_config('mnist', 1)
