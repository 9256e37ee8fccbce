"""KIP, ConvNet kernel, MNIST, 10 images a class.

Published by Nguyen et al. 2021b (NeurIPS, https://arxiv.org/abs/2107.13034), Table 1: test accuracy
KRR 99.1 %, finite network (width 1024, 5000 updates) 97.5 %.

    python launch.py --config=configs/mnist_ipc10.py --workdir=runs/mnist_ipc10

Time and accuracy: not measured, neither on 2 cores nor on a GPU.
"""

from configs import kip_convnet


def get_config():
  return kip_convnet.get_config('mnist', 10)
