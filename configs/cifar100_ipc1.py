"""KIP, ConvNet kernel, CIFAR-100, ZCA, 1 image a class.

Published by Nguyen et al. 2021b (NeurIPS, https://arxiv.org/abs/2107.13034), Table 1: test accuracy
KRR 33.3-34.9 %, finite network (width 1024, 5000 updates) 15.7 %.

    python launch.py --config=configs/cifar100_ipc1.py --workdir=runs/cifar100_ipc1

Time and accuracy: not measured, neither on 2 cores nor on a GPU.
"""

from configs import kip_convnet


def get_config():
  return kip_convnet.get_config('cifar100', 1)
