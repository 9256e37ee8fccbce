"""KIP with a network of one's own, on scikit-learn's digits.

kernels/architectures.py explains the stages.

    python launch.py --config=configs/own_architecture.py --workdir=runs/own

Time and accuracy: not measured, neither on 2 cores nor on a GPU.
"""

from configs import digits


def get_config():
  config = digits.get_config()
  with config.ignore_type():  # the default is a name
    config.run.architecture = {
      'stages': [
        # 8x8: two 3x3 convolutions, each with ReLU, then 2x2 average pooling.
        {'convs': 2, 'pool': True},
        {'convs': 1, 'pool': False},  # 4x4
      ],
      'readout': 'global_average_pool',  # or 'flatten'
      'hidden': 1,  # fully-connected ReLU layers between the readout and the output
      'w_std': 2**0.5,
      'b_std': 0.1,
    }
  return config
