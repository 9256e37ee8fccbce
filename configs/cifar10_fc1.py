r"""KIP, FC1 kernel, CIFAR-10, 10 images a class, fixed labels.

    python launch.py --config=configs/cifar10_fc1.py --config.run.data.dir=FOLDER \
      --workdir=runs/cifar10_fc1

The run in the notebook of Nguyen et al. 2021a (KIP, ICLR, https://arxiv.org/abs/2011.00050).
Published test accuracy at steps 0, 20, 100, 200, 300: 24.26, 41.41, 45.44, 46.23, 46.74 %.

Measured
on CIFAR-10 (JPEG copy): 23.27, 41.10, 45.12, 46.48, 46.64 %, in 248 s on 2 busy cores of an AMD
EPYC with AVX-512. On a GPU: not measured.
"""

from configs import base


def get_config():
  config = base.get_config()
  config.run.architecture = 'fc1'
  config.run.data.name = 'cifar10'
  config.run.kernel_dtype = 'float64'
  config.run.num_steps = 300
  config.run.images_per_class = 10
  config.run.learn_labels = False
  config.run.plan.target_tile = 250
  config.run.plan.target_tiles_per_task = 2
  config.system.snapshot_steps = (0, 20, 100, 200, 300)
  config.system.evaluation.nn_steps = 0
  return config
