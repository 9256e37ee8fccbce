"""KIP, ConvNet kernel, CIFAR-10, ZCA, 50 images a class.

Published by Nguyen et al. 2021b (NeurIPS, https://arxiv.org/abs/2107.13034), Table 1: test accuracy
KRR 79.7-80.6 %, finite network (width 1024, 5000 updates) 68.6 %.

    python launch.py --config=configs/cifar10_ipc50.py --workdir=runs/cifar10_ipc50

Time and accuracy: not measured, neither on 2 cores nor on a GPU.
"""

from configs import kip_convnet


def get_config():
  return kip_convnet.get_config('cifar10', 50)
