"""--cluster=kubernetes without a cluster: the manifest against Kubernetes' schemas, and its pods'
commands as processes of this machine."""

import base64
import contextlib
import dataclasses
import itertools
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import sys
import types
import typing

import forked
import pytest
import yaml
from launching import ROOT, SMALL, assert_as_in_one_process, started, status, wait

from programs import command_line, kubernetes_cluster
from transport import secret

# The models' base classes come with a client, which is not installed.
_base: typing.Any = types.ModuleType('lightkube.core.schema')
_base.dataclass, _base.field, _base.DictMixin = dataclasses.dataclass, dataclasses.field, object
sys.modules.setdefault('lightkube.core', types.ModuleType('lightkube.core'))
sys.modules.setdefault(_base.__name__, _base)
from lightkube.models import batch_v1, core_v1, networking_v1

MODELS = {'v1': core_v1, 'batch/v1': batch_v1, 'networking.k8s.io/v1': networking_v1}
LABEL = re.compile('[a-z]([-a-z0-9]{0,61}[a-z0-9])?')  # of DNS, as services must be named
INSTANCE, COMPONENT = 'app.kubernetes.io/instance', 'app.kubernetes.io/component'
ROLES = ('coordinator', 'evaluator', 'worker')
GIVEN = ('--kubernetes_image=registry.example/kip:1', '--kubernetes_claim=disk')


def _command(npz, *flags, workdir='/shared/run', given=GIVEN, config='configs/base.py'):
  return [
    sys.executable,
    'launch.py',
    '--cluster=kubernetes',
    f'--config={config}',
    f'--workdir={workdir}',
    f'--config.run.data.name={npz}',
    '--config.run.targets_per_step=33',
    *given,
    *flags,
  ]


@pytest.fixture(scope='module')
def manifest(npz, cache):
  """A function (*flags, workdir) -> (objects by kind and name, output, standard error)."""

  def make(*flags, **kwargs):
    done = forked.run(_command(npz, *flags, **kwargs), XDG_CACHE_HOME=cache)
    assert done.returncode == 0, done.stderr
    found = {(it['kind'], it['metadata']['name']): it for it in yaml.safe_load_all(done.stdout)}
    return found, done.stdout, done.stderr

  return make


@pytest.fixture(scope='module')
def plain(manifest):
  """The manifest without any further flag."""
  return manifest()


def _jobs(objects):
  """The jobs by role."""
  jobs = {name.rsplit('-', 1)[1]: it for (kind, name), it in objects.items() if kind == 'Job'}
  assert set(jobs) == set(ROLES)
  return jobs


def _pod(job):
  return job['spec']['template']['spec']


def _container(job):
  (container,) = _pod(job)['containers']
  return container


def _env(job):
  return {it['name']: it.get('value') for it in _container(job)['env']}


def _expanded(text, variables):
  """What Kubernetes makes of an argument: $(NAME) is a variable if there is one, $$ is $."""
  parts = re.findall(r'\$\$|\$\([^)]*\)|[^$]+|\$', text)
  return ''.join('$' if it == '$$' else variables.get(it[2:-1], it) for it in parts)


def _arguments(job, **variables):
  return [_expanded(argument, variables) for argument in _container(job)['args']]


def _mismatches(value, hint, where):
  """Yields where a value of YAML is not what a class or type of the schemas allows."""
  origin, inner = typing.get_origin(hint), typing.get_args(hint)
  if origin is typing.Union:
    if all(list(_mismatches(value, it, where)) for it in inner if it is not type(None)):
      yield from _mismatches(value, inner[0], where)
  elif origin is list:
    if not isinstance(value, list):
      yield f'{where}: {value!r} is no list'
    else:
      for i, item in enumerate(value):
        yield from _mismatches(item, inner[0], f'{where}[{i}]')
  elif hint is dict or origin is dict:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
      yield f'{where}: {value!r} is no dict of strings'
    else:
      for key, item in value.items():
        yield from _mismatches(item, inner[1] if inner else str, f'{where}.{key}')
  elif dataclasses.is_dataclass(hint):
    if not isinstance(value, dict):
      yield f'{where}: {value!r} is no object'
      return
    fields = {it.metadata.get('json', it.name): it for it in dataclasses.fields(hint)}
    hints = typing.get_type_hints(hint)
    for key, it in fields.items():
      if it.default is it.default_factory is dataclasses.MISSING and key not in value:
        yield f'{where}.{key} is missing'
    for key, item in value.items():
      if key not in fields:
        yield f'{where}.{key} is unknown'
      else:
        yield from _mismatches(item, hints[fields[key].name], f'{where}.{key}')
  elif type(value) is not hint and hint is not typing.Any:
    yield f'{where}: {value!r} is no {hint.__name__}'


def _all_mismatches(thing):
  model = getattr(MODELS[thing['apiVersion']], thing['kind'])
  return list(_mismatches(thing, model, thing['kind']))


@pytest.mark.parametrize(
  'spoil, message',
  [
    (lambda job: job['spec'].update(backofLimit=1), 'Job.spec.backofLimit is unknown'),
    (lambda job: job['spec'].update(completions='2'), "Job.spec.completions: '2' is no int"),
    (lambda job: job['spec'].pop('template'), 'Job.spec.template is missing'),
    (lambda job: job['spec'].update(suspend=None), 'Job.spec.suspend: None is no bool'),
    (
      lambda job: _container(job)['ports'].append({'containerPort': 80.0}),
      'Job.spec.template.spec.containers[0].ports[0].containerPort: 80.0 is no int',
    ),
    (lambda job: job['metadata'].update(labels={'a': 1}), 'Job.metadata.labels.a: 1 is no str'),
    (lambda job: _container(job).update(command='sh'), "command: 'sh' is no list"),
  ],
)
def test_the_check_against_the_schemas_is_strict(spoil, message):
  template = {'spec': {'containers': [{'name': 'a', 'ports': []}]}}
  job = {'apiVersion': 'batch/v1', 'kind': 'Job', 'metadata': {}, 'spec': {'template': template}}
  assert _all_mismatches(job) == []
  spoil(job)
  (found,) = _all_mismatches(job)
  assert found.endswith(message)


@pytest.mark.parametrize(
  'flags, workdir',
  [
    ((), '/shared/run'),
    (
      ('--kubernetes_gpu=nvidia.com/gpu', '--config.system.num_workers=100000'),
      '/disk/Ünïcode & "quotes" -- ' + 'x' * 200,
    ),
  ],
)
def test_every_object_is_as_the_schemas_say(manifest, flags, workdir):
  objects, _, _ = manifest(*flags, workdir=workdir)
  name = kubernetes_cluster.run_name(workdir, 'disk')
  assert set(objects) == {
    ('Secret', name),
    ('ConfigMap', name),
    ('NetworkPolicy', name),
    ('NetworkPolicy', f'{name}-coordinator'),
    ('Service', f'{name}-coordinator'),
    *(('Job', f'{name}-{role}') for role in ROLES),
  }
  for thing in objects.values():
    assert _all_mismatches(thing) == []
    assert thing['metadata']['labels'][INSTANCE] == name
  for job in _jobs(objects).values():
    # Pods are named after the job, the index and five characters.
    assert LABEL.fullmatch(job['metadata']['name'] + '-99999')
    assert job['spec']['template']['metadata']['labels'] == job['metadata']['labels']
    volumes = {volume['name'] for volume in _pod(job)['volumes']}
    mounts = [mount['name'] for mount in _container(job)['volumeMounts']]
    assert volumes == set(mounts) and len(mounts) == len(volumes)


@pytest.mark.parametrize(
  'workdir, words',
  [
    ('/shared/run', 'run-'),
    ('/shared/CIFAR10_ipc.50', 'cifar10-ipc-50-'),
    ('/shared/-_-', ''),
    ('/shared/蒸留', ''),
    ('/shared/7', '7-'),
    ('/shared/' + 'a' * 300, 'a' * 27 + '-'),
    ('/shared/' + 'a' * 26 + '-b', 'a' * 26 + '-'),
  ],
)
def test_names_are_labels_of_dns(workdir, words):
  name = kubernetes_cluster.run_name(workdir, 'disk')
  assert re.fullmatch(f'kip-{words}[0-9a-f]{{8}}', name) and len(name) <= 40
  assert LABEL.fullmatch(name)
  others = [kubernetes_cluster.run_name(workdir + 'a', 'disk')]
  others.append(kubernetes_cluster.run_name(workdir, 'other'))
  assert len({name, *others}) == 3


def test_the_secret_is_a_key_and_nothing_else_has_it(plain, manifest, tmp_path):
  objects, text, errors = plain
  (held,) = (it['data']['secret'] for (kind, _), it in objects.items() if kind == 'Secret')
  (tmp_path / 'secret').write_bytes(base64.b64decode(held))
  (tmp_path / 'secret').chmod(0o600)
  secret.Secret(str(tmp_path / 'secret'))  # it is whole
  assert text.count(held) == 1 and 'PRIVATE KEY' not in text + errors
  lines = base64.b64decode(held).decode().splitlines()
  assert not any(line in text + errors for line in lines)
  again, _, _ = manifest()
  (other,) = (it['data']['secret'] for (kind, _), it in again.items() if kind == 'Secret')
  assert other != held


def test_the_key_is_the_run_directorys_where_that_is_seen(tmp_path):
  key = kubernetes_cluster.key(str(tmp_path))
  assert (tmp_path / 'secret').read_bytes() == key == kubernetes_cluster.key(str(tmp_path))
  assert stat.S_IMODE((tmp_path / 'secret').stat().st_mode) == 0o600
  (tmp_path / 'secret').chmod(0o640)
  with pytest.raises(secret.SecretError, match=r'is open to other users \(mode 0640\)'):
    kubernetes_cluster.key(str(tmp_path))
  assert kubernetes_cluster.key(str(tmp_path / 'nowhere')) != key
  assert os.listdir(tmp_path) == ['secret']


def _selects(selector, labels):
  """Whether a selector of labels selects a pod."""
  return all(labels.get(k) == v for k, v in selector.get('matchLabels', {}).items()) and all(
    it['operator'] == 'In' and labels.get(it['key']) in it['values']
    for it in selector.get('matchExpressions', ())
  )


def _may_connect(policies, source, target, port):
  """Whether NetworkPolicies let a pod with labels `source` connect to one with labels `target`."""
  about = [it['spec'] for it in policies if _selects(it['spec']['podSelector'], target)]
  assert all(spec['policyTypes'] == ['Ingress'] for spec in about)
  return not about or any(
    {'protocol': 'TCP', 'port': port} in rule['ports']
    and any(_selects(peer['podSelector'], source) for peer in rule['from'])
    for spec in about
    for rule in spec['ingress']
  )


def test_only_workers_and_the_evaluator_reach_the_coordinators_port_and_nothing_else(manifest):
  objects, _, _ = manifest('--config.system.port=4711')
  pods = {
    role: job['spec']['template']['metadata']['labels'] for role, job in _jobs(objects).items()
  }
  pods |= {f'other {role}': {**labels, INSTANCE: 'other'} for role, labels in pods.items()}
  pods['stranger'] = {}
  policies = [it for (kind, _), it in objects.items() if kind == 'NetworkPolicy']
  connections = {
    (source, target, port)
    for source, target, port in itertools.product(pods, ROLES, (4711, 22))
    if _may_connect(policies, pods[source], pods[target], port)
  }
  assert connections == {('worker', 'coordinator', 4711), ('evaluator', 'coordinator', 4711)}
  (service,) = (it['spec'] for (kind, _), it in objects.items() if kind == 'Service')
  chosen = {role for role, labels in pods.items() if service['selector'].items() <= labels.items()}
  assert chosen == {'coordinator'}
  (ports,) = service['ports']
  assert (ports['port'], ports['targetPort'], ports['protocol']) == (4711, 4711, 'TCP')


def test_pods_are_confined(plain):
  for role, job in _jobs(plain[0]).items():
    pod, container = _pod(job), _container(job)
    assert pod['automountServiceAccountToken'] is pod['enableServiceLinks'] is False
    assert pod['securityContext'] == {
      'runAsNonRoot': True,
      'runAsUser': 1000,
      'runAsGroup': 1000,
      'fsGroup': 1000,
      'fsGroupChangePolicy': 'OnRootMismatch',
      'seccompProfile': {'type': 'RuntimeDefault'},
    }
    assert container['securityContext'] == {
      'allowPrivilegeEscalation': False,
      'readOnlyRootFilesystem': True,
      'capabilities': {'drop': ['ALL']},
    }
    volumes = {volume['name']: volume for volume in pod['volumes']}
    assert volumes['key']['secret']['defaultMode'] == 0o440
    assert volumes['key-copy']['emptyDir'] == {'medium': 'Memory', 'sizeLimit': '1Mi'}
    assert ('shared' in volumes) == (role != 'worker')
    assert ('config' in volumes) == (role == 'coordinator')


def _action(job, status=None, disrupted=False):
  """What a job does after a pod that ended with an exit status, or that was evicted."""
  for rule in job['spec']['podFailurePolicy']['rules']:
    codes, conditions = rule.get('onExitCodes'), rule.get('onPodConditions', ())
    if codes:
      assert codes['operator'] == 'In' and codes['containerName'] == _container(job)['name']
    if codes and status in codes['values']:
      return rule['action']
    if disrupted and {'type': 'DisruptionTarget', 'status': 'True'} in conditions:
      return rule['action']
  return 'Count'


def test_what_the_jobs_make_of_exit_statuses(plain):
  jobs = _jobs(plain[0])
  for role, job in jobs.items():
    failed = 'FailJob' if role == 'coordinator' else 'Count'
    found = [_action(job, status) for status in (75, 1, 2, 137)]
    assert found == ['Ignore', failed, 'Count', 'Count']
    assert _action(job, status=1, disrupted=True) == 'Ignore'  # there was no time for a checkpoint
    assert _pod(job)['restartPolicy'] == 'Never'  # podFailurePolicy asks for it
    assert _pod(job)['terminationGracePeriodSeconds'] == 60
  assert (
    jobs['coordinator']['spec']['backoffLimit'] == jobs['evaluator']['spec']['backoffLimit'] == 6
  )
  assert jobs['worker']['spec']['backoffLimitPerIndex'] == 6
  assert jobs['worker']['spec']['completionMode'] == 'Indexed'


def test_what_the_flags_do(plain, manifest):
  objects, text, _ = plain
  jobs = _jobs(objects)
  name = kubernetes_cluster.run_name('/shared/run', 'disk')
  assert jobs['worker']['spec']['parallelism'] == jobs['worker']['spec']['completions'] == 2
  assert all(_container(job)['image'] == 'registry.example/kip:1' for job in jobs.values())
  assert all(_env(job)['CUDA_VISIBLE_DEVICES'] == '' for job in jobs.values())
  assert 'nvidia' not in text
  for role in ('coordinator', 'evaluator'):
    claims = {it['name']: it.get('persistentVolumeClaim') for it in _pod(jobs[role])['volumes']}
    assert claims['shared'] == {'claimName': 'disk'}
    mounts = {it['name']: it['mountPath'] for it in _container(jobs[role])['volumeMounts']}
    assert mounts['shared'] == '/shared' and _env(jobs[role])['XDG_CACHE_HOME'] == '/shared/.cache'
    assert _container(jobs[role])['resources']['requests']['cpu'] == '2'
  assert _arguments(jobs['worker']) == [
    '--role=worker',
    f'--coordinator={name}-coordinator:8443',
    '--secret=/run/kip/secret',
    '--threads=4',
  ]
  assert _container(jobs['worker'])['resources']['requests']['cpu'] == '4'
  assert _arguments(jobs['evaluator']) == [
    '--role=evaluator',
    '--workdir=/shared/run',
    '--secret=/run/kip/secret',
  ]
  assert '--config.system.worker_timeout=86400' in _arguments(jobs['coordinator'])

  changed, _, _ = manifest(
    '--config.system.num_workers=7',
    '--config.system.worker_threads=12',
    '--config.system.port=4711',
    '--config.system.worker_timeout=5',
    '--kubernetes_gpu=example.com/gpu',
    workdir='/disk/a/b/../run/',
  )
  name = kubernetes_cluster.run_name('/disk/a/run', 'disk')
  jobs = _jobs(changed)
  assert jobs['worker']['spec']['parallelism'] == jobs['worker']['spec']['completions'] == 7
  assert _arguments(jobs['worker'])[1:] == [
    f'--coordinator={name}-coordinator:4711',
    '--secret=/run/kip/secret',
    '--threads=12',
  ]
  resources = _container(jobs['worker'])['resources']
  assert resources['requests']['cpu'] == '12' and resources['limits']['example.com/gpu'] == '1'
  assert _pod(jobs['worker'])['tolerations'] == [
    {'key': 'example.com/gpu', 'operator': 'Exists', 'effect': 'NoSchedule'}
  ]
  assert 'CUDA_VISIBLE_DEVICES' not in _env(jobs['worker'])
  for role in ('coordinator', 'evaluator'):
    assert set(_container(jobs[role])['resources']['limits']) == {'memory'}
    assert 'tolerations' not in _pod(jobs[role]) and _env(jobs[role])['CUDA_VISIBLE_DEVICES'] == ''
    assert '--workdir=/disk/a/run' in _arguments(jobs[role])
    mounts = {it['name']: it['mountPath'] for it in _container(jobs[role])['volumeMounts']}
    assert mounts['shared'] == '/disk'
  arguments = _arguments(jobs['coordinator'])
  assert [it for it in arguments if 'worker_timeout' in it] == ['--config.system.worker_timeout=5']
  assert arguments[-3:] == [
    '--config.system.port=4711',
    f'--host={name}-coordinator',
    '--secret=/run/kip/secret',
  ]


def _mebibytes(job):
  resources = _container(job)['resources']
  assert resources['requests']['memory'] == resources['limits']['memory']
  return int(resources['limits']['memory'].removesuffix('Mi'))


def test_memory_follows_the_estimate(plain, manifest):
  """It leaves room for the supervising process, half as much again, and CUDA."""
  pattern = r'about ([\d.]+) GiB for the coordinator, ([\d.]+) GiB for each worker, ([\d.]+) GiB'
  before = _jobs(plain[0])
  flags = ('--config.run.images_per_class=32', '--kubernetes_gpu=nvidia.com/gpu')
  objects, _, errors = manifest(*flags, '--config.run.initial_images=noise')
  estimates = [float(gib) for gib in re.findall(pattern, errors)[0]]
  for role, gib, cuda in zip(('coordinator', 'worker', 'evaluator'), estimates, (0, 2, 0)):
    mebibytes = _mebibytes(_jobs(objects)[role])
    assert mebibytes == pytest.approx(1.5 * 1024 * (0.25 + gib + cuda), abs=1.5 * 1024 * 0.051)
    assert mebibytes > _mebibytes(before[role]) > 1.5 * 256


def test_odd_arguments_arrive_as_they_were_given(manifest, tmp_path):
  """The shell, YAML and Kubernetes' own variables leave them alone, and the comment stays one."""
  odd = '/shared/my "run" it\'s $(HOME) $$(HOME) $HOME `x` \\n: # ~ 蒸\n留\x85\U0001f600'
  cache = f'{tmp_path}/a "cache" $(HOME) $$'
  config = tmp_path / 'my config.py'
  config.write_text(
    '"""é \t \'\'\': #"""\nfrom configs import base\n\n\n\ndef get_config(argument):\n'
    '  config = base.get_config()\n  config.run.seed = int(argument)\n  return config   \n\n'
  )
  objects, text, _ = manifest(
    '--config.system.cache_dir',
    cache,
    '--config.run.learning_rate',
    '0.5',
    '--kubernetes_image',
    'a: "b" #',
    workdir=odd,
    config=f'{config}:7',
  )
  jobs = _jobs(objects)
  arguments = _arguments(jobs['coordinator'], HOME='/tmp')
  assert arguments[:2] == ['--role=coordinator', '--config=/etc/kip/config/config.py:7']
  assert f'--workdir={odd}' in arguments
  i = arguments.index('--config.system.cache_dir')
  assert arguments[i + 1 : i + 4] == [cache, '--config.run.learning_rate', '0.5']
  assert not any('kubernetes' in it or 'cluster' in it or str(config) in it for it in arguments)
  assert f'--workdir={odd}' in _arguments(jobs['evaluator'], HOME='/tmp')
  assert all(_container(job)['image'] == 'a: "b" #' for job in jobs.values())
  (held,) = (it['data'] for (kind, _), it in objects.items() if kind == 'ConfigMap')
  assert held == {'config.py': config.read_text().rstrip() + '\n'}
  assert all(line.startswith('#') for line in text.partition('\n---\n')[0].splitlines())


def test_every_step_is_a_command(plain):
  objects, text, errors = plain
  comment = [line.removeprefix('# ') for line in text.partition('\n---\n')[0].splitlines()]
  steps = dict(re.findall(r'^([a-z ]+): +(kubectl .*)$', '\n'.join(comment), re.MULTILINE))
  name = kubernetes_cluster.run_name('/shared/run', 'disk')
  jobs = [f'job/{name}-{role}' for role in ('worker', 'evaluator', 'coordinator')]
  assert {step: shlex.split(command)[1:] for step, command in steps.items()} == {
    'start': ['apply', '-f', 'FILE', '(this', 'output)'],
    'follow': ['logs', '-f', f'job/{name}-coordinator'],
    'see pods': ['get', 'pods', '-l', f'{INSTANCE}={name}'],
    'status': ['exec', f'job/{name}-coordinator', '--']
    + ['.venv/bin/python', 'launch.py', '--status', '--workdir=/shared/run'],
    'add workers': ['patch', jobs[0], '-p', '{"spec": {"completions": 4, "parallelism": 4}}'],
    'stop': ['patch', *jobs, '-p', '{"spec": {"suspend": true}}'],
    'resume': ['patch', *jobs, '-p', '{"spec": {"suspend": false}}'],
    'remove': ['delete', '--cascade=foreground']
    + ['job,service,secret,configmap,networkpolicy', '-l', f'{INSTANCE}={name}'],
  }
  assert all(('Job', job.removeprefix('job/')) in objects for job in jobs)
  kinds = ['configmap', 'job', 'networkpolicy', 'secret', 'service']
  assert sorted({kind.lower() for kind, _ in objects}) == kinds
  assert all(command in errors for command in steps.values())
  assert 'never run on a cluster' in ' '.join(comment)


@pytest.mark.parametrize(
  'given, workdir, message',
  [
    (('--kubernetes_claim=disk',), '/shared/run', '--kubernetes_image=NAME is missing'),
    (('--kubernetes_image=kip',), '/shared/run', '--kubernetes_claim=NAME is missing'),
    (GIVEN, 'shared/run', '--workdir=shared/run must be the path in the pods, such as /shared/run'),
    (GIVEN, '/shared', '--workdir=/shared must be the path in the pods'),
    (GIVEN, '/shared/..', '--workdir=/shared/.. must be the path in the pods'),
    (GIVEN, '/tmp/run', '--workdir=/tmp/run must be the path in the pods'),
    (GIVEN, '/lib64/run', '--workdir=/lib64/run must be the path in the pods'),
    (GIVEN, '//kip/run', '--workdir=//kip/run must be the path in the pods'),
  ],
)
def test_bad_input_gets_one_line_and_status_2(npz, given, workdir, message):
  done = forked.run(_command(npz, workdir=workdir, given=given))
  lines = [line for line in done.stderr.splitlines() if line.startswith('error:')]
  assert done.returncode == 2 and len(lines) == 1 and message in lines[0], done.stderr
  assert done.stdout == ''


@pytest.mark.parametrize(
  'edit, message',
  [
    (('port: {{ port }}', 'port: {{ pord }}'), r"access\.yaml cannot be used: 'pord' is undefined"),
    (('policyTypes: [Ingress]', 'policyTypes: [Ingress'), r'access\.yaml cannot be used: while'),
    (('{{ key_base64 }}', '{{ key_base64 '), r'access\.yaml:\d+ cannot be used: expected token'),
  ],
)
def test_a_template_with_a_mistake_is_named(tmp_path, edit, message):
  templates = tmp_path / 'templates'
  shutil.copytree(os.path.join(ROOT, 'programs', 'kubernetes'), templates)
  text = (templates / 'access.yaml').read_text()
  assert edit[0] in text
  (templates / 'access.yaml').write_text(text.replace(*edit))
  with pytest.raises(command_line.BadInput) as raised:
    kubernetes_cluster.render(str(templates), name='a', key_base64='b', config_text='c\n', port=1)
  assert re.search(message, str(raised.value)) and '\n' not in str(raised.value)


def _start(objects, role, life, tmp_path):
  """Starts a pod's command as a process of this machine, with its folders below `tmp_path`."""
  name, job = f'{role}{life}', _jobs(objects)[role]
  data = {kind: it['data'] for (kind, _), it in objects.items() if 'data' in it}
  folders = {'/etc/kip': f'{name}/etc', '/run/kip': f'{name}/run', '/tmp/cache': f'{name}/cache'}
  for folder in (f'{name}/etc/key', f'{name}/etc/config', f'{name}/run'):
    (tmp_path / folder).mkdir(parents=True)
  key = tmp_path / name / 'etc/key/secret'
  key.write_bytes(base64.b64decode(data['Secret']['secret']))
  key.chmod(0o440)
  (tmp_path / name / 'etc/config/config.py').write_text(data['ConfigMap']['config.py'])

  def here(text):
    for folder, place in {**folders, '/shared': 'shared'}.items():
      text = re.sub(f'(?<![a-z]){folder}', f'{tmp_path}/{place}', text)
    return re.sub('kip-[-a-z0-9]*-coordinator', 'localhost', text)

  environment = {
    it['name']: here(it.get('value', f'{role}-0-{life}')) for it in _container(job)['env']
  }
  script = _container(job)['command'][2].replace('.venv/bin/python', shlex.quote(sys.executable))
  command = ['sh', '-c', here(script), role, *map(here, _arguments(job))]
  return started(command, tmp_path / f'{name}.log', JOB_COMPLETION_INDEX='0', **environment)


def test_the_pods_commands_make_a_run(manifest, tmp_path, make_run):
  """As processes of this machine, hence slow. The worker is stopped as by an eviction, and
  replaced; tests of hosts stop the coordinator."""
  workdir, num_steps = tmp_path / 'shared' / 'run', 100
  with socket.create_server(('', 0)) as free:
    port = free.getsockname()[1]
  flags = (f'--config.run.num_steps={num_steps}', f'--config.system.port={port}')
  objects, _, _ = manifest(*SMALL, *flags)
  with contextlib.ExitStack() as stack:

    def start(role, life=0):
      return stack.enter_context(_start(objects, role, life, tmp_path))

    def log_has(text):
      wait(lambda: text in (tmp_path / 'coordinator0.log').read_text())

    pods = [start('coordinator')]
    log_has('The coordinator is at localhost:')
    evicted = start('worker')
    log_has('worker_0_0 joined')
    evicted.send_signal(signal.SIGTERM)
    assert evicted.wait(60) == 75, (tmp_path / 'worker0.log').read_text()
    pods += [start('worker', 1), start('evaluator')]
    ends = [pod.wait(120) for pod in pods]
    assert ends == [0, 0, 0], [path.read_text() for path in tmp_path.glob('*.log')]
  assert set(status(workdir)['workers']) == {'worker_0_0', 'worker_0_1'}
  assert stat.S_IMODE((tmp_path / 'worker1/run/secret').stat().st_mode) == 0o600
  assert not (workdir / 'secret').exists()
  assert_as_in_one_process(workdir, make_run, num_steps)
