"""KIP, ConvNet kernel, CIFAR-10, ZCA, 10 images a class.

Published by Nguyen et al. 2021b (NeurIPS, https://arxiv.org/abs/2107.13034), Table 1: test accuracy
KRR 75.5 %, finite network (width 1024, 5000 updates) 62.7 %.

    python launch.py --config=configs/cifar10_ipc10.py --workdir=runs/cifar10_ipc10

Measured without augmentation, CIFAR-10 (JPEG copy), on one H100: KRR 63.00 % at step 90 (4 minutes;
run.plan.target_tile=1000), where it was stopped; a finite network (width 128, 1000 updates) on the
images of step 96 47.32 %. To convergence: not measured.
"""

from configs import kip_convnet


def get_config():
  return kip_convnet.get_config('cifar10', 10)
