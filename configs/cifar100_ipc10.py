"""KIP, ConvNet kernel, CIFAR-100, ZCA, 10 images a class.

Published by Nguyen et al. 2021b (NeurIPS, https://arxiv.org/abs/2107.13034), Table 1: test accuracy
KRR 49.5 %, finite network (width 1024, 5000 updates) 28.3 %.

    python launch.py --config=configs/cifar100_ipc10.py --workdir=runs/cifar100_ipc10

Time and accuracy: not measured, neither on 2 cores nor on a GPU.
"""

from configs import kip_convnet


def get_config():
  return kip_convnet.get_config('cifar100', 10)
