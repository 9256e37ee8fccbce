r"""Label Solve, FC1 kernel, CIFAR-10, 50 images a class.

    python launch.py --config=configs/cifar10_fc1_ls.py --config.run.data.dir=FOLDER \
      --workdir=runs/cifar10_fc1_ls

The run in the notebook of Nguyen et al. 2021a (KIP, ICLR, https://arxiv.org/abs/2011.00050).
Published test accuracy: hard labels 32.11 %, solved ones 46.99 %.

Measured on CIFAR-10 (JPEG copy), 2 cores of an AMD EPYC with AVX-512, seeds 0, 1, 2: 30.22, 30.78,
31.38 % -> 47.47, 46.78, 46.46 % (test MSE .04781, .04696, .04730 -> .03580, .03594, .03597), 9 to
18 s each. On a GPU: not measured.
"""

from configs import base


def get_config():
  config = base.get_config()
  config.run.method = 'label_solve'
  config.run.num_steps = 1
  config.run.architecture = 'fc1'
  config.run.data.name = 'cifar10'
  config.run.kernel_dtype = 'float64'
  config.run.images_per_class = 50
  config.system.evaluation.nn_steps = 0
  return config
