"""Memory that control groups leave, on trees as systems have them, and that processes need."""

import numpy as np
import psutil
import pytest

from configs import base, schema
from data import preprocess, store
from kernels import architectures, registry
from programs import command_line, memory

GIB, MIB = 2**30, 2**20
V2 = '30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n'
V1 = (
  '31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n'
  '33 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n'
  '35 31 0:32 {top} /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n'
)
UNIFIED = '41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n'
UNLIMITED = 9223372036854771712  # version 1's word for no limit


@pytest.fixture
def system(tmp_path):
  """A function (mountinfo, cgroup, groups of version 1, groups of version 2) -> the root of such a
  system; groups are {name: (limit, used, {statistic: bytes})}."""

  def make(mounts, groups, first=None, second=None):
    (tmp_path / 'proc' / 'self').mkdir(parents=True)
    (tmp_path / 'proc' / 'self' / 'mountinfo').write_text(
      '22 1 8:1 / / rw - ext4 /dev/sda1 rw\n' + mounts
    )
    (tmp_path / 'proc' / 'self' / 'cgroup').write_text(groups)
    for where, found, names in (
      ('sys/fs/cgroup/memory', first, ('memory.limit_in_bytes', 'memory.usage_in_bytes')),
      ('sys/fs/cgroup', second, ('memory.max', 'memory.current')),
    ):
      for group, (limit, used, statistics) in (found or {}).items():
        folder = tmp_path / where / group
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in zip(names, (limit, used)):
          (folder / name).write_text(f'{value}\n')
        (folder / 'memory.stat').write_text(
          ''.join(f'{name} {value}\n' for name, value in {'anon': used, **statistics}.items())
        )
    return str(tmp_path)

  return make


def test_version_2_and_what_lies_above(system):
  root = system(
    V2,
    '0::/a/b/c\n',
    second={
      'a': (5 * GIB, 2 * GIB, {'inactive_file': GIB, 'active_file': MIB}),
      'a/b': ('max', GIB, {}),
      'a/b/c': (4 * GIB, GIB, {}),
      'a/other': (MIB, MIB, {}),
    },
  )
  assert memory.left_by_control_groups(root) == [3 * GIB, 4 * GIB + MIB]
  assert memory.available(root) == min(3 * GIB, psutil.virtual_memory().available)


def test_version_1_and_what_lies_above(system):
  job = 'slurm/uid_0/job_7'
  mounts = V1.format(top='/') + UNIFIED
  root = system(
    mounts,
    '9:name=systemd:/x\n4:cpu,cpuacct:/y\n3:memory:/slurm/uid_0/job_7/step_0\n0::/\n',
    first={
      f'{job}/step_0': (UNLIMITED, GIB, {}),
      job: (2 * GIB, GIB, {'inactive_file': 1, 'total_inactive_file': MIB}),
      '': (UNLIMITED, 9 * GIB, {}),
    },
  )
  assert sorted(memory.left_by_control_groups(root))[0] == GIB + MIB
  assert memory.available(root) == min(GIB + MIB, psutil.virtual_memory().available)


@pytest.mark.parametrize(
  'mounts, groups, first, second',
  [
    (V2, '0::/\n', None, {'': (GIB, MIB, {})}),  # a namespace of its own
    (V2, '0::/../../outside\n', None, {'': (GIB, MIB, {})}),
    (V1.format(top='/docker/17'), '3:memory:/docker/17\n', {'': (GIB, MIB, {})}, None),
    (
      V1.format(top='/docker/17'),
      '3:memory:/docker/17/inner\n',
      {'': (GIB, MIB, {}), 'inner': (2 * GIB, MIB, {})},
      None,
    ),
    (V1.format(top='/docker/17'), '3:memory:/elsewhere\n', {'': (GIB, MIB, {})}, None),
  ],
  ids=['2', '2 above', '1', '1 inside', '1 elsewhere'],
)
def test_a_container_sees_its_own_group_as_the_top(system, mounts, groups, first, second):
  assert min(memory.left_by_control_groups(system(mounts, groups, first, second))) == GIB - MIB


def test_page_cache_counts_as_free_and_nothing_is_less_than_none(system):
  assert memory.left_by_control_groups(
    system(V2, '0::/a\n', second={'a': (GIB, GIB + MIB, {})})
  ) == [0]


@pytest.mark.parametrize(
  'mounts, groups',
  [('', ''), (V2, '0::/a\n'), (V1.format(top='/'), '2:cpu:/\n'), (UNIFIED, '0::/gone\n')],
)
def test_without_limits_it_is_the_machines(system, mounts, groups):
  root = system(mounts, groups)
  assert memory.left_by_control_groups(root) == []
  assert 0.5 < memory.available(root) / psutil.virtual_memory().available < 2
  assert memory.available(root + '/nowhere') > 0


@pytest.mark.parametrize('implementation', ['native', 'jax', 'reference'])
@pytest.mark.parametrize(
  'name, shape',
  [
    ('fc2', (8, 9, 2)),
    ('conv3', (8, 9, 2)),
    ('convnet', (32, 32, 3)),
    ('myrtle5', (9, 8, 1)),
    ('convnet2', (28, 28, 1)),
  ],
)
def test_what_a_kernel_keeps_of_an_image(name, shape, implementation):
  if implementation not in registry.available():
    pytest.skip('not built')
  kernel = registry.make_kernel(name, implementation=implementation)
  prepared = kernel.prepare(np.ones((1, *shape), np.float32))
  kept = sum(variance.nbytes for variance in prepared.variances)
  height, width, _ = shape
  estimate = memory.table_bytes(architectures.get(name), height, width, 4)
  assert kept == estimate if implementation == 'native' else kept <= estimate + 64
  if name == 'convnet' and implementation == 'native':
    assert estimate == 12048


def _prepared(num_train, num_test=1000, shape=(32, 32, 3)):
  sets = [
    (np.broadcast_to(np.float32(0), (n, *shape)), np.arange(n) % 10) for n in (num_train, num_test)
  ]
  transform = preprocess.Transform(np.zeros(1), np.ones(1))
  return store.Prepared('key', 'content', 'name', *sets[0], *sets[1], 10, transform)


def _config(**changes):
  config = base.get_config()
  config.run.architecture = 'convnet'
  config.update_from_flattened_dict(
    {path.replace('__', '.'): value for path, value in changes.items()}
  )
  return schema.from_dict(schema.Config, config.to_dict())


@pytest.mark.parametrize(
  'changes, process, each',
  [
    ({}, 'worker', 12048),
    ({'run__kernel_dtype': 'float64'}, 'worker', 24080),
    ({}, 'coordinator', 0),
    ({'run__augmentation__fraction': 0.5}, 'worker', 0),
    ({'run__method': 'label_solve', 'run__num_steps': 1}, 'worker', 0),
    ({'run__architecture': 'fc1'}, 'worker', 16),
  ],
)
def test_a_worker_keeps_the_variances_of_every_training_image_it_may_use_again(
  changes, process, each
):
  few, many = (memory.needs(_config(**changes), _prepared(n)) for n in (10000, 50000))
  assert getattr(many, process) - getattr(few, process) == 40000 * each


def test_the_evaluator_keeps_those_of_the_test_set_and_trains_a_network():
  few, many = (memory.needs(_config(), _prepared(10000, n)).evaluator for n in (1000, 10000))
  assert many - few == 9000 * 12048

  def with_network(width, steps):
    config = _config(system__evaluation__nn_width=width, system__evaluation__nn_steps=steps)
    return memory.needs(config, _prepared(10000)).evaluator

  # A batch of test images before and after a layer.
  assert with_network(1024, 10) - with_network(128, 10) == 2 * 500 * 4 * (1024 - 128) * 32 * 32
  assert with_network(128, 10) - with_network(1024, 0) > 500 * MIB


def test_a_limit_of_its_control_group_refuses_a_run(system):
  root = system(V2, '0::/job\n', second={'job': (300 * MIB, 200 * MIB, {})})
  config = _config(system__num_workers=2)
  with pytest.raises(command_line.BadInput, match='this run needs about .* 0.1 GiB are available'):
    memory.check(config, _prepared(10000), memory.Here.ALL, memory.available(root))


@pytest.mark.parametrize(
  'here, room, refused',
  [
    (memory.Here.ALL, 2 * GIB, True),
    (memory.Here.COORDINATOR, 2 * GIB, False),
    (memory.Here.COORDINATOR, 100 * MIB, True),
    (memory.Here.NOTHING, 0, False),
  ],
)
def test_only_the_memory_of_processes_that_run_here_is_asked_for(here, room, refused):
  config = _config(system__num_workers=4)
  if refused:
    needs = 'GiB for the coordinator, .* GiB for each worker, .* GiB for the evaluator'
    with pytest.raises(command_line.BadInput, match=needs):
      memory.check(config, _prepared(50000), here, room)
  else:
    assert 'GiB for each worker' in memory.check(config, _prepared(50000), here, room)
