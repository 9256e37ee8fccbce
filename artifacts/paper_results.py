"""Test accuracies that the papers publish, in per cent, for comparison in a run's report.

ICLR 2021: Nguyen et al. 2021a, https://arxiv.org/abs/2011.00050.
NeurIPS 2021: Nguyen et al. 2021b, https://arxiv.org/abs/2107.13034.
"""

from typing import Any

from configs import schema

_NETWORK = {'nn_width': 1024, 'nn_steps': 5000}  # of every finite network in NeurIPS 2021

# NeurIPS 2021, Table 1: data set -> images a class -> (KRR, finite network). KIP, ConvNet, labels
# learned, augmentation, ZCA for colour images; at convergence, after 50,000 updates at most.
_KIP_CONVNET = {
  'mnist': {1: ('96.5', '90.1'), 10: ('99.1', '97.5'), 50: ('99.5', '98.4')},
  'fashion_mnist': {1: ('76.7', None), 10: ('88.8', None), 50: ('91.0', None)},
  'svhn_cropped': {1: ('64.3', None), 10: ('80.9', None), 50: ('84.0', None)},
  'cifar10': {1: ('63.4-64.7', '49.9'), 10: ('75.5', '62.7'), 50: ('79.7-80.6', '68.6')},
  'cifar100': {1: ('33.3-34.9', '15.7'), 10: ('49.5', '28.3')},
}
# NeurIPS 2021: data set -> images a class -> KRR.
_LABEL_SOLVE_CONVNET = {
  'cifar10': {1: '26.09', 10: '53.59', 50: '65.89'},
  'fashion_mnist': {1: '65.30', 10: '80.84', 50: '86.85'},
}
_GREY = ('mnist', 'fashion_mnist')


def find(run: schema.Run) -> dict[str, Any] | None:
  """Finds the published result of a run's setting.

  Returns:
    None where there is none; else `kind` (what it is, in words), `krr` (accuracy), and where a
    finite network is published too, `network` (its accuracy), `nn_width`, `nn_steps`.
  """
  data, images = run.data.name, run.images_per_class
  if run.kernel != 'ntk' or run.initial_images != 'real':
    return None
  if run.architecture == 'convnet' and run.data.zca == (data not in _GREY):
    if run.method == 'kip' and run.learn_labels and images in _KIP_CONVNET.get(data, {}):
      krr, network = _KIP_CONVNET[data][images]
      row = {'kind': 'published at convergence (NeurIPS 2021, Table 1)', 'krr': krr}
      return {**row, 'network': network, **_NETWORK} if network else row
    if run.method == 'label_solve' and images in _LABEL_SOLVE_CONVNET.get(data, {}):
      krr = _LABEL_SOLVE_CONVNET[data][images]
      return {'kind': 'published (NeurIPS 2021, Label Solve)', 'krr': krr}
  if run.architecture == 'fc1' and data == 'cifar10' and not run.data.zca:
    if run.method == 'kip' and images == 10 and not run.learn_labels:
      return {'kind': 'published at step 300 (ICLR 2021, notebook)', 'krr': '46.74'}
    if run.method == 'label_solve' and images == 50:
      return {'kind': 'published (ICLR 2021, notebook)', 'krr': '46.99'}
  return None
