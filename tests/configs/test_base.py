"""Defaults are valid; every kind of mistake gets one line that names the field, the value and what
is allowed."""

import copy
import dataclasses
import importlib
import pkgutil

import numpy as np
import pytest

import configs
from artifacts import paper_results
from configs import base, schema, validation


def _with(path, value):
  config = copy.deepcopy(base.get_config().to_dict())
  node = config
  *parents, leaf = path.split('.')
  for parent in parents:
    node = node[parent]
  if value is None:
    del node[leaf]
  else:
    node[leaf] = value
  return config


MODULES = ('reference', 'schema', 'validation')
FILES = [module.name for module in pkgutil.iter_modules(configs.__path__)]


@pytest.mark.parametrize('name', [name for name in FILES if name not in MODULES])
def test_shipped_configs_are_valid(name):
  module = importlib.import_module(f'configs.{name}')
  doc = ' '.join((module.__doc__ or '').split())
  config = validation.validate(module.get_config().to_dict())
  if name != 'base':
    assert f'--config=configs/{name}.py' in doc
  if name not in ('base', 'kip_convnet'):  # the second is what many share
    row = paper_results.find(config.run) or {}
    if 'krr' in row:
      assert f'{row["krr"]} %' in doc or f'{row["krr"]},' in doc
    if 'network' in row:
      width, steps = row['nn_width'], row['nn_steps']
      assert f'finite network (width {width}, {steps} updates) {row["network"]} %' in doc


@pytest.mark.parametrize(
  'path, value, message',
  [
    ('run.seed', -1, r'run.seed must lie between 0 and \d+, got -1'),
    ('run.seed', 1.5, 'run.seed must be a whole number, got 1.5'),
    ('run.seed', True, 'run.seed must be a whole number, got True'),
    ('run.data.zca', 1, 'run.data.zca must be true or false, got 1'),
    ('run.data.zca_regularisation', 0.0, 'run.data.zca_regularisation must be above 0'),
    (
      'run.augmentation.fraction',
      1.5,
      'run.augmentation.fraction must lie between 0 and 1, got 1.5',
    ),
    (
      'run.augmentation.fraction',
      0.5,
      'run.augmentation.fraction=0.5 and .*rotation, .* go together: set the fraction and at least',
    ),
    ('run.augmentation.horizontal_flip', True, 'run.augmentation.fraction=0.0 and .* go together'),
    (
      'run.augmentation.rotation',
      -1.0,
      'run.augmentation.rotation must lie between 0 and 180, got -1.0',
    ),
    (
      'run.augmentation.width_shift',
      1.0,
      'run.augmentation.width_shift must be a part of the side, from 0 to below 1, got 1.0',
    ),
    (
      'run.augmentation.channel_shift',
      float('nan'),
      'run.augmentation.channel_shift must lie between 0',
    ),
    ('run.data.size', -1, 'run.data.size must lie between 0 and 4096, got -1'),
    ('run.data.size', '32', "run.data.size must be a whole number, got '32'"),
    ('run.targets_per_step', -1, r'run.targets_per_step must lie between 0 and \d+, got -1'),
    ('run.num_steps', 0, 'run.num_steps must be a whole number from 1 to 1000000000, got 0'),
    ('run.num_steps', None, 'run.num_steps is missing'),
    ('run.method', 'ls', "run.method must be one of kip, label_solve, .*; got 'ls'"),
    (
      'run.method',
      'label_solve',
      'run.num_steps must be 1 where run.method is label_solve; got 1000',
    ),
    ('run.learning_rate', 'fast', "run.learning_rate must be a number, got 'fast'"),
    ('run.learning_rate', float('nan'), 'run.learning_rate must be above 0 .* got nan'),
    ('run.ridge', 0.0, 'run.ridge must be above 0'),
    ('run.learn_labels', 1, 'run.learn_labels must be true or false, got 1'),
    ('run.implementation', 'magic', "run.implementation must be one of auto, .*; got 'magic'"),
    ('run.kernel_dtype', 'float16', 'run.kernel_dtype must be one of float32, float64'),
    ('run.architecture', 'resnet', "run.architecture: unknown name 'resnet'; known: fc1"),
    (
      'run.architecture',
      {'stages': [{'convs': 1}]},
      r'run.architecture: a stage must be \{"convs"',
    ),
    ('run.architecture', {'layers': 3}, "run.architecture: unknown key 'layers'; known: stages"),
    ('run.architecture', 7, 'run.architecture: expected a name or a dict of stages, got int'),
    ('run.optimizer', 'adm', "run.optimizer: unknown name 'adm'; known: adabelief, .*adam, "),
    (
      'run.optimizer',
      {'name': 'sgd', 'momentm': 0.9},
      "run.optimizer: sgd: got an unexpected keyword argument 'momentm'; its arguments: momentum",
    ),
    (
      'run.learning_rate',
      {'name': 'cosine_decay_schedule', 'init_value': 1.0},
      "run.learning_rate: .* missing a required argument: 'decay_steps'",
    ),
    ('run.learning_rate', -1.0, 'run.learning_rate must be above 0'),
    ('run.label_learning_rate_factor', 0.0, 'run.label_learning_rate_factor must be above 0'),
    ('run.kernel', 'ntks', "run.kernel must be one of ntk, nngp; got 'ntks'"),
    ('run.parameterization', 'mup', "run.parameterization must be one of ntk, standard; got 'mup'"),
    ('run.plan.target_tile', -5, 'run.plan.target_tile must be a whole number from 1'),
    ('system.port', 70000, 'system.port must lie between 0 and 65535, got 70000'),
    ('system.snapshot_steps', (1, -2), r'system.snapshot_steps must be steps.* got \(1, -2\)'),
    ('system.snapshot_steps', ('a',), 'system.snapshot_steps must be steps'),
    (
      'system.evaluation.nn_l2s',
      (-1.0,),
      r'system.evaluation.nn_l2s must be one or more numbers, each at least 0.* got \(-1.0,\)',
    ),
    (
      'system.evaluation.nn_learning_rate_factors',
      (1.0, 0.0),
      'nn_learning_rate_factors must be .* each above 0',
    ),
    ('system.evaluation.nn_learning_rate_factors', (), r'one or more numbers.* got \(\)'),
    ('system.evaluation.nn_l2s', ('a',), r"one or more numbers.* got \('a',\)"),
    ('system.evaluation.nn_l2s', (float('nan'),), 'one or more numbers'),
    (
      'system.evaluation.nn_loss',
      'hinge',
      "system.evaluation.nn_loss must be one of mse, cross_entropy; got 'hinge'",
    ),
    ('system.evaluation.nn_seeds', 0, 'system.evaluation.nn_seeds must be a whole number from 1'),
    (
      'system.evaluation.nn_architecture',
      'resnet',
      "system.evaluation.nn_architecture: unknown name 'resnet'; known: fc1",
    ),
    ('run.architecture', '', "run.architecture: unknown name ''"),
    ('system.num_workrs', 3, 'unknown field system.num_workrs; did you mean system.num_workers'),
  ],
)
def test_mistakes(path, value, message):
  with pytest.raises(validation.ConfigError, match=message) as error:
    validation.validate(_with(path, value))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('implementation', ['native', 'jax'])
def test_the_fast_kernels_know_ntk_parameterisation_alone(implementation):
  config = _with('run.parameterization', 'standard')
  for accepted in ('auto', 'reference'):
    config['run']['implementation'] = accepted
    validation.validate(config)
  config['run']['implementation'] = implementation
  message = f"'{implementation}' knows NTK parameterisation alone; .*'standard' needs"
  with pytest.raises(validation.ConfigError, match=f'run.implementation: {message}'):
    validation.validate(config)


@pytest.mark.parametrize(
  'path, value, message',
  [
    (
      'run.images_per_class',
      5,
      'run.images_per_class must be at most 4, the images of the smallest class; got 5',
    ),
    (
      'run.targets_per_step',
      10,
      r'multiple of 3 \(the classes\) and at most 12 \(the smallest class has 4 images\), or 13 '
      r'\(the whole training set\); got 10',
    ),
    ('run.targets_per_step', 15, 'at most 12'),
    (
      'run.architecture',
      'convnet',
      'run.architecture: 3 2x2 poolings leave nothing of a 7x9 image; at least 8x8',
    ),
  ],
)
def test_mistakes_that_only_the_data_show(path, value, message):
  labels = np.array([0, 1, 2] * 4 + [0])

  def check(**changes):
    run = schema.Run(**{'architecture': 'fc1', **changes})
    validation.validate_with_data(schema.Config(run), labels, 3, (7, 9, 1))

  for accepted in (13, 12):
    check(targets_per_step=accepted)
  with pytest.raises(validation.ConfigError, match=message):
    check(**{'targets_per_step': 12, path.removeprefix('run.'): value})


@pytest.mark.parametrize(
  'counts, wanted, targets',
  [
    ([5000] * 10, 0, 5000),  # CIFAR-10
    ([500] * 100, 0, 5000),  # CIFAR-100
    ([141, 150, 160], 0, 423),
    ([2000, 3000, 4000], 0, 4998),
    ([1] * 6000, 0, 6000),
    ([1, 9], 0, 2),
    ([141, 150, 160], 3, 3),
    ([141, 150, 160], 451, 451),
  ],
)
def test_targets_are_as_many_as_suit(counts, wanted, targets):
  labels = np.repeat(np.arange(len(counts)), counts)
  run = schema.Run(architecture='fc1', targets_per_step=wanted)
  resolved = validation.resolve_targets(run, labels, len(counts))
  assert resolved == targets and isinstance(resolved, int)
  config = schema.Config(dataclasses.replace(run, targets_per_step=resolved))
  validation.validate_with_data(config, labels, len(counts), (8, 8, 1))


def test_the_default_suits_any_set():
  assert base.get_config().run.targets_per_step == 0


def test_specs_by_dict():
  validation.validate(_with('run.optimizer', {'name': 'sgd', 'momentum': 0.9}))
  validation.validate(
    _with(
      'run.learning_rate', {'name': 'cosine_decay_schedule', 'init_value': 1.0, 'decay_steps': 10}
    )
  )
  validation.check_path('run.learning_rate.init_value')
  with pytest.raises(validation.ConfigError, match='unknown field run.optimizr'):
    validation.check_path('run.optimizr')


def test_whole_numbers_are_numbers_and_a_dict_is_an_architecture():
  validation.validate(_with('run.learning_rate', 1))
  validation.validate(_with('system.evaluation.nn_l2s', [0, 1e-3]))
  validation.validate(_with('system.evaluation.nn_architecture', {'hidden': 2}))
  validation.validate(
    _with('run.architecture', {'stages': [{'convs': 1, 'pool': True}], 'b_std': 0})
  )


def test_what_keeps_a_run_from_resuming():
  schedule = {'name': 'piecewise_constant_schedule', 'init_value': 0.1}
  saved, wanted = (  # JSON's keys are text
    schema.Run(learning_rate={**schedule, 'boundaries_and_scales': boundaries})
    for boundaries in ({'100': 0.5}, {100: 0.5})
  )
  wanted = dataclasses.replace(wanted, num_steps=1001, data=schema.Data(dir='elsewhere'))
  assert not validation.differences(saved, wanted)
  wanted = dataclasses.replace(wanted, num_steps=5, plan=schema.Plan(target_tile=10))
  assert validation.differences(saved, wanted) == ['run.plan.target_tile (250 there, 10 here)']
  # Its last update is of its own kind.
  saved, wanted = (dataclasses.replace(run, method='kip+label_solve') for run in (saved, wanted))
  assert validation.differences(saved, wanted) == [
    'run.num_steps (1000 there, 5 here)',
    'run.plan.target_tile (250 there, 10 here)',
  ]


def test_a_run_that_ends_with_label_solve_does_not_grow():
  saved = schema.Run(method='kip+label_solve')
  wanted = dataclasses.replace(saved, num_steps=2000)
  assert validation.differences(saved, wanted) == ['run.num_steps (1000 there, 2000 here)']


@pytest.mark.parametrize(
  'method, step',
  [('kip', -1), ('label_solve', 0), ('label_solve+kip', 0), ('kip+label_solve', 999)],
)
def test_which_update_solves_for_labels(method, step):
  assert schema.Run(method=method).label_solve_step == step


def test_snapshots():
  chosen = [step for step in range(2101) if schema.System().is_snapshot(step, 2100)]
  assert chosen[:12] == [0, 1, 2, 4, 6, 8, 12, 18, 26, 37, 54, 78]
  assert chosen[12:] == [112, 162, 233, 335, 483, 695, 1000, 1500, 2000, 2100]
  system = schema.System(snapshot_steps=(3, 7))
  assert [step for step in range(11) if system.is_snapshot(step, 10)] == [0, 3, 7, 10]


def test_the_evaluated_network_must_fit_the_images_too():
  evaluation = schema.Evaluation(nn_architecture='convnet')
  config = schema.Config(schema.Run(architecture='fc1'), schema.System(evaluation=evaluation))
  with pytest.raises(
    validation.ConfigError,
    match='system.evaluation.nn_architecture: 3 2x2 poolings leave nothing of a 7x9 image',
  ):
    validation.validate_image_size(config, (7, 9, 1))
  validation.validate_image_size(config, (8, 8, 1))
