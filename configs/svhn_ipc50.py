"""KIP, ConvNet kernel, SVHN, ZCA, 50 images a class.

Published by Nguyen et al. 2021b (NeurIPS, https://arxiv.org/abs/2107.13034), Table 1: test accuracy
KRR 84.0 %.

    python launch.py --config=configs/svhn_ipc50.py --workdir=runs/svhn_ipc50

Time and accuracy: not measured, neither on 2 cores nor on a GPU.
"""

from configs import kip_convnet


def get_config():
  return kip_convnet.get_config('svhn_cropped', 50)
