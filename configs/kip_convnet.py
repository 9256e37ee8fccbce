"""KIP, ConvNet kernel, learned labels: what all cells of a paper's table share; MNIST by default.

    python launch.py --config=configs/kip_convnet.py --workdir=runs/mnist_ipc1

The protocol is that of Nguyen et al. 2021b (NeurIPS, https://arxiv.org/abs/2107.13034), Table 1;
configs/*_ipc*.py have a file for each cell. Its figures are those at convergence, after 50,000
updates at most: --config.run.num_steps says how far to go, and a finished run goes on by the same
command with more. The paper keeps the learning rate constant; a schedule is set in a configuration
file of one's own, in `with config.ignore_type():` as in configs/own_architecture.py. Which
augmentations it uses is published, their strengths are not: these are ours.

Time and accuracy: see the files of the cells.
"""

from configs import base

DIGITS, GREY = ('mnist', 'svhn_cropped'), ('mnist', 'fashion_mnist')


def get_config(data='mnist', images_per_class=1):
  config = base.get_config()
  config.run.data.name = data
  config.run.data.zca = data not in GREY
  config.run.images_per_class = images_per_class
  config.run.augmentation.fraction = 0.5
  config.run.augmentation.rotation = 10.0
  config.run.augmentation.width_shift = 0.1
  config.run.augmentation.height_shift = 0.1
  config.run.augmentation.horizontal_flip = data not in DIGITS
  config.run.augmentation.channel_shift = 10.0
  return config
