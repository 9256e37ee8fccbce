"""Runs a distillation under fire and compares it, bit by bit, with the same one left in peace.
`make chaos`, or

    PYTHONPATH=. python tests/chaos --workdir=runs/chaos --seed=0

For each kind of step, in one pass and in two halves, two runs of launch.py with worker, coordinator
and evaluator processes; in the second a seeded schedule kills them (SIGKILL) in the middle of every
kind of task and write, pauses some (SIGSTOP), repeats calls and loses answers, and cuts the newest
checkpoint short once. Exit status 0 if every kill of the schedules struck, and the support set,
Adam's state, every snapshot and every row of metrics.jsonl are the same.
"""

import argparse
import collections
import glob
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# Kinds of steps, and the flags for them.
KINDS = {'one pass': (), 'two halves': ('--config.run.plan.support_per_task=10',)}
TASKS = {
  'one pass': ('support_blocks', 'targets', 'support_vjp'),
  'two halves': ('support_blocks', 'target_blocks', 'target_vjp', 'support_vjp'),
}
# What the coordinator waits for. In two halves SUPPORT_VJP's pieces are there before the last of
# TARGET_VJP's, so it never waits for them.
AWAITED = {'one pass': TASKS['one pass'], 'two halves': TASKS['two halves'][:3]}
TIMINGS = ('wall_seconds', 'kernel_pairs_per_second')  # of a row: what may differ
PAUSES = (*['kernel_worker'] * 3, *['evaluator'] * 2, 'coordinator')
WORKERS = 2


class Activity:
  """The activity that the newest process of a role records."""

  def __init__(self, folder: str, role: str):
    self._pattern, self.pid = os.path.join(folder, f'{role}*.*'), 0

  def now(self) -> str:
    """'idle' between activities, 'dead' where no process is alive."""
    if not self._alive():
      pids = {path: path.rpartition('.')[2] for path in glob.glob(self._pattern)}
      paths = [path for path, pid in pids.items() if os.path.exists(f'/proc/{pid}')]
      if not paths:
        return 'dead'
      path = random.choice(paths)
      self.pid, self._file = int(pids[path]), open(path, 'rb', buffering=0)
      if not self._alive():
        return 'dead'
    return self._recorded()

  def at_death(self) -> str:
    """The last activity of a process that was just killed."""
    while self._alive():
      time.sleep(0.001)
    return self._recorded()

  def forget(self) -> None:
    """The next `now` looks for a process again."""
    self.pid = 0

  def _recorded(self) -> str:
    return os.pread(self._file.fileno(), 32, 0).decode().strip()

  def _alive(self) -> bool:
    try:
      with open(f'/proc/{self.pid}/stat', encoding='ascii') as file:
        return file.read().rpartition(')')[2].split()[0] not in 'ZX'
    except (FileNotFoundError, ProcessLookupError):
      return False


class Havoc(threading.Thread):
  """Kills and pauses the processes of a run until every kind of activity has been struck often
  enough."""

  def __init__(
    self, folder: str, workdir: str, activities: dict[str, tuple[str, ...]], seed: int, kills: int
  ):
    super().__init__(daemon=True)
    self._activities = activities
    self._folder, self._workdir, self._random = folder, workdir, random.Random(seed)
    self._orders = {}
    for role, kinds in activities.items():
      self._orders[role] = list(kinds) * kills
      self._random.shuffle(self._orders[role])
    self._pauses = list(PAUSES)
    self.killed: collections.Counter[tuple[str, str]] = collections.Counter()
    self.paused: collections.Counter[str] = collections.Counter()
    self.missed, self.cut = 0, ''
    self.over = threading.Event()

  @property
  def left(self) -> list[str]:
    """The kills that have not struck."""
    return [f'{role} {activity}' for role, orders in self._orders.items() for activity in orders]

  def run(self):
    activities = {role: Activity(self._folder, role) for role in self._activities}
    next_blow = dict.fromkeys(activities, 0.0)
    while self.left and not self.over.is_set():
      time.sleep(0.001)
      for role, orders in self._orders.items():
        activity = activities[role].now()
        if activity == 'dead':
          next_blow[role] = time.monotonic() + self._random.uniform(1, 6)
        elif orders and time.monotonic() > next_blow[role] and activity == orders[-1]:
          time.sleep(self._random.uniform(0, 0.03))
          self._strike(role, activities[role])
        elif (
          time.monotonic() > next_blow[role]
          and activity != 'idle'
          and role in self._pauses
          and self._random.random() < 0.002
        ):
          self._pause(role, activities[role])

  def _strike(self, role, activity):
    os.kill(activity.pid, signal.SIGKILL)
    found = activity.at_death()
    activity.forget()
    if found not in self._activities[role]:
      self.missed += 1
      return
    self.killed[role, found] += 1
    if found in self._orders[role]:
      self._orders[role].remove(found)
    if role == 'coordinator' and not self.cut and sum(self.killed.values()) > 5:
      self._cut_newest_checkpoint()

  def _pause(self, role, activity):
    self._pauses.remove(role)
    self.paused[role] += 1
    os.kill(activity.pid, signal.SIGSTOP)
    threading.Timer(self._random.uniform(2, 6), self._continue, (activity.pid,)).start()
    activity.forget()

  @staticmethod
  def _continue(pid):
    if os.path.exists(f'/proc/{pid}'):
      os.kill(pid, signal.SIGCONT)

  def _cut_newest_checkpoint(self):
    folder = os.path.join(self._workdir, 'checkpoints')
    steps = sorted(name for name in os.listdir(folder) if name.isdigit())
    if len(steps) > 1:
      files = [
        os.path.join(path, name)
        for path, _, names in os.walk(os.path.join(folder, steps[-1]))
        for name in names
      ]
      victim = max(files, key=os.path.getsize)
      os.truncate(victim, os.path.getsize(victim) // 2)
      self.cut = steps[-1]


def launch(
  workdir: str, kind: str, steps: int, calls: float, havoc: Havoc | None, folder: str
) -> float:
  """Runs launch.py with steps of a kind; returns the seconds it took."""
  shutil.rmtree(folder, ignore_errors=True)
  os.makedirs(folder)
  command = [
    sys.executable,
    'launch.py',
    '--config=configs/digits.py',
    f'--workdir={workdir}',
    '--lp_launch_type=local_mp',
    f'--config.run.num_steps={steps}',
    '--config.run.images_per_class=2',
    '--config.run.plan.support_tile=10',
    f'--config.system.num_workers={WORKERS}',
    f'--config.system.snapshot_steps={",".join(map(str, range(0, steps, 3)))}',
    '--config.system.checkpoint_seconds=2',
    '--config.system.log_seconds=5',
    '--config.system.evaluation.nn_steps=0',
    *KINDS[kind],
  ]
  environment = {
    **os.environ,
    'PYTHONPATH': os.path.dirname(os.path.abspath(__file__)),
    'KIP_CHAOS': folder,
    'KIP_CHAOS_CALLS': str(calls),
  }
  start = time.monotonic()
  with open(os.path.join(folder, 'log'), 'w', encoding='utf-8') as log:
    process = subprocess.Popen(
      command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
    )
    if havoc is not None:
      havoc.start()
    status = process.wait()
  if havoc is not None:
    havoc.over.set()
    havoc.join()
  if status:
    sys.exit(f'{workdir} ended with status {status}; see {log.name}.')
  return time.monotonic() - start


def compare(peace: str, fire: str) -> list[str]:
  """Names what differs between two run directories."""
  import jax
  import optax

  from artifacts import checkpoints  # here and below: they import JAX
  from distillation.state import SupportState

  found = []

  def final_state(workdir):
    with np.load(os.path.join(workdir, 'distilled.npz'), allow_pickle=False) as file:
      parameters = {name: file[name].astype(np.float64) for name in ('images', 'labels')}
    template = SupportState(
      0, **parameters, optimizer=jax.device_get(optax.adam(1.0).init(parameters))
    )
    restored = checkpoints.Checkpoints(os.path.join(workdir, 'checkpoints')).restore(template)
    assert restored, f'{workdir} has no checkpoint'
    return restored[0]

  if not all(
    np.asarray(a).tobytes() == np.asarray(b).tobytes()
    for a, b in zip(*(jax.tree.leaves(final_state(path)) for path in (peace, fire)), strict=True)
  ):
    found.append('the final state')
  names = sorted(os.listdir(os.path.join(peace, 'snapshots')))
  if names != sorted(os.listdir(os.path.join(fire, 'snapshots'))):
    found.append('which snapshots there are')
  for name in [os.path.join('snapshots', name) for name in names] + ['distilled.npz']:
    with np.load(os.path.join(peace, name)) as a, np.load(os.path.join(fire, name)) as b:
      found += [
        f'{array} of {name}'
        for array in ('images', 'labels')
        if a[array].tobytes() != b[array].tobytes()
      ]
  rows = []
  for workdir in (peace, fire):
    with open(os.path.join(workdir, 'metrics.jsonl'), encoding='utf-8') as file:
      rows.append(
        [
          {key: value for key, value in json.loads(line).items() if key not in TIMINGS}
          for line in file
        ]
      )
  if rows[0] != rows[1]:
    found.append('metrics.jsonl')
  return found


def survives(kind: str, workdir: str, seed: int, steps: int, kills: int) -> bool:
  """Tells whether runs with steps of a kind end the same in peace and under fire; prints what
  happened."""
  peace, fire = os.path.join(workdir, 'peace'), os.path.join(workdir, 'fire')
  seconds = launch(peace, kind, steps, 0.0, None, os.path.join(workdir, 'peace_records'))
  print(f'{kind}, in peace: {steps} steps in {seconds:.0f} s', flush=True)
  records = os.path.join(workdir, 'fire_records')
  activities = {
    'kernel_worker': TASKS[kind],
    'coordinator': (*AWAITED[kind], 'checkpoint', 'snapshot'),
    'evaluator': ('evaluate', 'append'),
  }
  havoc = Havoc(records, fire, activities, seed, kills)
  seconds_under_fire = launch(fire, kind, steps, 0.03, havoc, records)

  def lines(name):
    with open(os.path.join(records, name), encoding='utf-8') as file:
      return file.read().splitlines()

  calls = collections.Counter(line.split()[0] for line in lines('calls'))
  print(
    f'{kind}, under fire: {sum(havoc.killed.values())} kills survived '
    f'({havoc.missed} more between activities), {sum(havoc.paused.values())} pauses, '
    f'{calls["repeated"]} calls repeated, {calls["lost"]} answers lost, '
    f'the checkpoint of step {int(havoc.cut or -1)} cut short; '
    f'{len(lines("steps")) - steps} steps redone, {seconds_under_fire - seconds:.0f} s lost'
  )
  for role, struck in activities.items():
    print(
      f'  {role}: '
      + ', '.join(f'{havoc.killed[role, activity]} in {activity}' for activity in struck)
    )
  problems = [f'the run ended before these struck: {", ".join(havoc.left)}'] if havoc.left else []
  if not havoc.cut:
    problems.append('no checkpoint was cut short')
  differing = compare(peace, fire)
  if differing:
    problems.append(f'these differ: {", ".join(differing)}')
  print(
    '\n'.join(problems) or 'the final state, every snapshot and every row are the same, bit by bit',
    flush=True,
  )
  return not problems


def main() -> int:
  parser = argparse.ArgumentParser()
  parser.add_argument('--workdir', default='runs/chaos')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--steps', type=int, default=80, help='of each kind')
  parser.add_argument('--kind', choices=KINDS, help='of the steps; both by default')
  parser.add_argument('--kills', type=int, default=3, help='of each role in each of its activities')
  arguments = parser.parse_args()
  workdir = os.path.abspath(arguments.workdir)
  shutil.rmtree(workdir, ignore_errors=True)
  survived = [
    survives(
      kind,
      os.path.join(workdir, kind.replace(' ', '_')),
      arguments.seed,
      arguments.steps,
      arguments.kills,
    )
    for kind in ([arguments.kind] if arguments.kind else KINDS)
  ]
  return 0 if all(survived) else 1


if __name__ == '__main__':
  sys.exit(main())
