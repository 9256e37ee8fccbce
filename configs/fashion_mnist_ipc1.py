"""KIP, ConvNet kernel, Fashion-MNIST, 1 image a class.

Published by Nguyen et al. 2021b (NeurIPS, https://arxiv.org/abs/2107.13034), Table 1: test accuracy
KRR 76.7 %.

    python launch.py --config=configs/fashion_mnist_ipc1.py --workdir=runs/fashion_mnist_ipc1

Time and accuracy: not measured, neither on 2 cores nor on a GPU.
"""

from configs import kip_convnet


def get_config():
  return kip_convnet.get_config('fashion_mnist', 1)
