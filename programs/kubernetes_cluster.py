"""`--cluster=kubernetes`: prints the manifest of a run, made of the templates in
programs/kubernetes/.

    python launch.py --cluster=kubernetes --config=FILE --workdir=/shared/run \\
      --config.system.num_workers=8 --kubernetes_image=REGISTRY/kip \\
      --kubernetes_claim=shared --kubernetes_gpu=nvidia.com/gpu > kip.yaml
    kubectl apply -f kip.yaml
"""

import base64
import hashlib
import json
import math
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jinja2
import yaml
from absl import flags, logging

from artifacts import run_directory
from programs import command_line, memory, slurm_cluster, start, supervisor
from transport import secret as keys

_IMAGE = flags.DEFINE_string(
  'kubernetes_image', None, 'Image of this project (Dockerfile), where the cluster finds it.'
)
_CLAIM = flags.DEFINE_string(
  'kubernetes_claim',
  None,
  'PersistentVolumeClaim of the shared volume; it is mounted at the first folder of --workdir.',
)
_GPU = flags.DEFINE_string(
  'kubernetes_gpu',
  '',
  'Resource of which each worker gets one, such as nvidia.com/gpu; by default workers have none.',
)

_TEMPLATES = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'kubernetes')
_OWN_FLAGS = (
  'cluster',
  'kubernetes_image',
  'kubernetes_claim',
  'kubernetes_gpu',
  'config',
  'workdir',
)

# Folders of a pod.
_KEY_FOLDER, _CONFIG = '/run/kip', '/etc/kip/config/config.py'
_KEY_FILE = f'{_KEY_FOLDER}/secret'
# Where the image has its own files.
_TAKEN = re.compile('bin|boot|dev|etc|kip|lib.*|proc|root|run|sbin|sys|tmp|usr')

_PORT = 8443  # where `system.port` is 0
_CPUS = 4  # of a worker, where `system.worker_threads` is 0; its threads
_OTHERS_CPUS = 2  # of coordinator and evaluator
# Workers may wait in the queue; a coordinator that has none for a day is started again.
_PATIENT = '--config.system.worker_timeout=86400'
_NAME_AT_MOST = 40  # characters: a label of DNS has at most 63, and jobs and pods add to the name

_MARGIN = 1.5  # of memory over the estimate: a pod that exceeds its limit is killed
# Bytes; 0.2 GiB measured in the coordinator's pod, which also prepares the data.
_SUPERVISOR = 2**28
_PREPARING = 3  # memory for that, relative to the result; 1.2 measured for CIFAR-10's shape
_CUDA = 2**31  # bytes of main memory: libraries and context


class Node(NamedTuple):
  """What the pods of one node of the program are given.

  Attributes:
    arguments: of launch.py.
    cpus, mebibytes: CPUs and memory.
    gpu: resource of which it gets one; '': none.
  """

  arguments: list[str]
  cpus: int
  mebibytes: int
  gpu: str = ''


def print_manifest(argv: Sequence[str]) -> int:
  """Prints the manifest of the run that the flags describe, and, on standard error, the commands to
  use it with.

  Returns the exit status. Raises BadInput, SecretError, and what `start.check` raises.
  """
  workdir = _workdir()
  # Prepared here as well: so mistakes show at once, and the memory that the pods need.
  checked = start.check(None, memory.Here.NOTHING)
  for remark in checked.remarks:
    logging.info(remark)
  name, system = run_name(workdir, _CLAIM.value or ''), checked.config.system
  port, cpus = system.port or _PORT, system.worker_threads or _CPUS
  mount = '/' + workdir.split('/')[1]
  path, colon, argument = command_line.config_file().partition(':')
  rest = slurm_cluster.unless_given(_PATIENT, slurm_cluster.passed_on(argv, _OWN_FLAGS))
  needs, secret = memory.needs(checked.config, checked.prepared), f'--secret={_KEY_FILE}'
  preparing = _PREPARING * checked.prepared.train_images.nbytes
  gpu = _GPU.value
  manifest = render(
    _TEMPLATES,
    name=name,
    image=_IMAGE.value,
    claim=_CLAIM.value,
    mount=mount,
    cache=f'{mount}/.cache',
    key_folder=_KEY_FOLDER,
    key_file=_KEY_FILE,
    key_base64=base64.b64encode(key(workdir)).decode(),
    config_text=pathlib.Path(path).read_text(encoding='utf-8').rstrip() + '\n',
    port=port,
    num_workers=system.num_workers,
    grace_seconds=2 * supervisor.LAUNCHER_NOTICE,
    coordinator=Node(
      [
        '--role=coordinator',
        f'--config={_CONFIG}{colon}{argument}',
        *rest,
        f'--workdir={workdir}',
        f'--config.system.port={port}',
        f'--host={name}-coordinator',
        secret,
      ],
      _OTHERS_CPUS,
      _mebibytes(max(needs.coordinator, preparing)),
    ),
    evaluator=Node(
      ['--role=evaluator', f'--workdir={workdir}', secret],
      _OTHERS_CPUS,
      _mebibytes(needs.evaluator),
    ),
    worker=Node(
      ['--role=worker', f'--coordinator={name}-coordinator:{port}', secret, f'--threads={cpus}'],
      cpus,
      _mebibytes(needs.worker + (_CUDA if gpu else 0)),
      gpu,
    ),
  )
  steps = _steps(name, workdir, system.num_workers)
  print(_header(argv, steps) + manifest, end='')
  print(steps, file=sys.stderr)
  return 0


def run_name(workdir: str, claim: str) -> str:
  """Makes a label of DNS of the name of a run directory, another one for each directory and
  volume."""
  digest = hashlib.sha256(f'{claim}:{workdir}'.encode()).hexdigest()[:8]
  words = re.sub('[^a-z0-9]+', '-', os.path.basename(workdir).lower())
  room = _NAME_AT_MOST - len(f'kip--{digest}')
  return '-'.join(filter(None, ['kip', words[:room].strip('-'), digest]))


def _workdir() -> str:
  """The run directory as pods see it. Raises BadInput if it, or another flag, cannot be used."""
  if not _IMAGE.value:
    raise command_line.BadInput(
      '--kubernetes_image=NAME is missing: an image of this project that the cluster can pull.'
    )
  if not _CLAIM.value:
    raise command_line.BadInput(
      '--kubernetes_claim=NAME is missing: the PersistentVolumeClaim for the run directory.'
    )
  given = start.WORKDIR.value or ''
  workdir = '/' + os.path.normpath(given).lstrip('/')
  folders = workdir.split('/')[1:]
  if not given.startswith('/') or len(folders) < 2 or _TAKEN.fullmatch(folders[0]):
    raise command_line.BadInput(
      f'--workdir={given} must be the path in the pods, such as /shared/run where the shared '
      "volume is to be mounted at /shared; not in one of the system's own folders."
    )
  return workdir


def key(workdir: str) -> bytes:
  """The content of the key's file: of the run directory's, if this host sees that; else a new one.

  Raises SecretError.
  """
  directory = run_directory.RunDirectory(workdir)
  if not os.path.isdir(workdir):
    return keys.new()
  keys.make(directory.secret)
  keys.Secret(directory.secret)  # checks it
  return pathlib.Path(directory.secret).read_bytes()


def _mebibytes(estimate: int) -> int:
  """The memory of a pod, by the estimate of what its node needs (bytes)."""
  return math.ceil(_MARGIN * (_SUPERVISOR + estimate) / 2**20)


def _steps(name: str, workdir: str, num_workers: int) -> str:
  """The commands that the users of a run need, a line each."""

  def patch(spec: dict[str, int | bool], *jobs: str) -> str:
    names = (f'job/{name}-{job}' for job in jobs)
    return shlex.join(['kubectl', 'patch', *names, '-p', json.dumps({'spec': spec})])

  all_jobs = 'worker', 'evaluator', 'coordinator'
  kinds = 'job,service,secret,configmap,networkpolicy'
  label, more = f'-l app.kubernetes.io/instance={name}', 2 * num_workers
  status = shlex.join(['.venv/bin/python', 'launch.py', '--status', f'--workdir={workdir}'])
  add = patch({'completions': more, 'parallelism': more}, 'worker')
  stop, resume = (patch({'suspend': value}, *all_jobs) for value in (True, False))
  return _printable(
    f'start:       kubectl apply -f FILE  (this output)\n'
    f'follow:      kubectl logs -f job/{name}-coordinator\n'
    f'see pods:    kubectl get pods {label}\n'
    f'status:      kubectl exec job/{name}-coordinator -- {status}\n'
    f'add workers: {add}\n'
    f'stop:        {stop}\n'
    f'resume:      {resume}\n'
    f'remove:      kubectl delete --cascade=foreground {kinds} {label}\n'
    f'results:     {workdir} on the volume\n'
    'A run that failed, or that gets other settings, is removed and started again; it goes on from '
    'its\nlast checkpoint.'
  )


def _header(argv: Sequence[str], steps: str) -> str:
  """The comment before the manifest."""
  text = (
    f'Made by: {_printable(shlex.join(["python", *argv]))}\n\n{steps}\n\n'
    "This file holds the run's key: keep it from others, who could run code in its pods.\n"
    'Such manifests were checked against the schemas of Kubernetes, but never run on a cluster.\n'
    'It needs Kubernetes 1.29 or newer, and a network plugin that heeds NetworkPolicy.'
  )
  return ''.join(f'# {line}'.rstrip() + '\n' for line in text.split('\n'))


def _printable(text: str) -> str:
  """Escapes what would end a comment, or may not be in one."""
  return ''.join(
    c if c.isprintable() or c == '\n' else c.encode('unicode_escape').decode() for c in text
  )


def render(templates: str, **values: object) -> str:
  """Fills in the templates of a folder. Raises BadInput if they cannot be."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(templates),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    autoescape=False,
  )
  environment.filters.update(quoted=_quoted, argument=_argument, block=_block)
  parts = []
  for name in ('access.yaml', 'coordinator.yaml', 'evaluator.yaml', 'workers.yaml'):
    try:
      part = environment.get_template(name).render(values).strip()
      for _ in yaml.safe_load_all(part):
        pass
    except (jinja2.TemplateError, yaml.YAMLError) as error:
      line = f':{error.lineno}' if isinstance(error, jinja2.TemplateSyntaxError) else ''
      raise command_line.BadInput(
        f'the template {templates}/{name}{line} cannot be used: {" ".join(str(error).split())}'
      ) from error
    parts.append(f'---\n{part}\n')
  return ''.join(parts)


def _quoted(text: str) -> str:
  """A string of YAML."""
  return yaml.safe_dump(text, default_style='"', width=math.inf).rstrip('\n')


def _argument(text: str) -> str:
  """A string of YAML in which Kubernetes, too, replaces no variable."""
  return _quoted(text.replace('$', '$$'))


def _block(text: str) -> str:
  """A string of several lines of YAML."""
  return yaml.safe_dump(text, default_style='|', width=math.inf, allow_unicode=True).rstrip('\n')
