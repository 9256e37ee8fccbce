"""KIP, ConvNet kernel, CIFAR-10, ZCA, 1 image a class.

Published by Nguyen et al. 2021b (NeurIPS, https://arxiv.org/abs/2107.13034), Table 1: test accuracy
KRR 63.4-64.7 %, finite network (width 1024, 5000 updates) 49.9 %.

    python launch.py --config=configs/cifar10_ipc1.py --workdir=runs/cifar10_ipc1

Measured without augmentation, CIFAR-10 (JPEG copy): on one H100 KRR 59.87 % at step 1000 (4.5
minutes; run.plan.target_tile=1250), no more up to step 1800, 60.83 % at step 2800 (12.3 minutes)
with the learning rate brought to 0 by a cosine over the last 1000; on 2 cores of an Intel Xeon
54.63 % at step 600 (20 minutes) with 500 targets a step, and 16 s a step with 5000. RESULTS.md has
the curves and the commands. To convergence: not measured.
"""

from configs import kip_convnet


def get_config():
  return kip_convnet.get_config('cifar10', 1)
