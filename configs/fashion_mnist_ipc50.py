"""KIP, ConvNet kernel, Fashion-MNIST, 50 images a class.

Published by Nguyen et al. 2021b (NeurIPS, https://arxiv.org/abs/2107.13034), Table 1: test accuracy
KRR 91.0 %.

    python launch.py --config=configs/fashion_mnist_ipc50.py --workdir=runs/fashion_mnist_ipc50

Time and accuracy: not measured, neither on 2 cores nor on a GPU.
"""

from configs import kip_convnet


def get_config():
  return kip_convnet.get_config('fashion_mnist', 50)
