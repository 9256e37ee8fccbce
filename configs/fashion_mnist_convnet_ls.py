"""Label Solve, ConvNet kernel, Fashion-MNIST, 1 image a class.

    python launch.py --config=configs/fashion_mnist_convnet_ls.py --workdir=runs/fashion_ls

With --config.run.images_per_class=10 or 50 it is the others that Nguyen et al. 2021b (NeurIPS,
https://arxiv.org/abs/2107.13034) report. Published test accuracy for 1, 10, 50 images a class:
65.30, 80.84, 86.85 %.

Measured on 2 cores of an AMD EPYC, 1 image a class, three seeds: 64.08 ± 0.21 %. Time, and more
images a class: not measured.
"""

from configs import base


def get_config():
  config = base.get_config()
  config.run.method = 'label_solve'
  config.run.num_steps = 1
  config.run.data.name = 'fashion_mnist'
  return config
