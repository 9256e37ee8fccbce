"""KIP with the ConvNet kernel by K2's protocol, labels learned: what the cells of its Table 1
share. Each has its own file; this is

    python launch.py --config=configs/kip_convnet.py --workdir=runs/mnist_ipc1

The papers' figures are those at convergence, after 50,000 updates at most: --config.run.num_steps
says how far to go, and a run that is there goes on by the same command with more. They keep the
learning rate constant; a schedule is set in a configuration file of one's own, in `with
config.ignore_type():` as in configs/own_architecture.py. Which augmentations they use is published,
their strengths are not: these are ours.
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
