"""The notebook's cells, run in order, on a shorter demo."""

import json
import os
import threading

import numpy as np
import pytest

from artifacts import run_directory
from configs import digits, validation
from data import store
from programs import local, start

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@pytest.mark.usefixtures('compiled_as_for_users')
def test_from_a_demo_to_a_network_that_reads_real_digits(tmp_path, cache, monkeypatch):
  config = digits.get_config()
  config.run.num_steps, config.system.snapshot_steps = 30, (0, 30)
  config.system.num_workers, config.system.evaluation.nn_steps = 2, 0
  config = validation.validate(config.to_dict())
  directory = run_directory.RunDirectory(str(tmp_path))
  directory.open(config, store.prepare(config.run.data, cache).key)
  local.distil(start.Run(config, directory, cache), threading.Event())

  monkeypatch.setenv('DEMO_DIR', str(tmp_path))
  monkeypatch.setenv('MPLBACKEND', 'agg')
  monkeypatch.chdir(ROOT)
  with open('notebooks/digits.ipynb', encoding='utf-8') as file:
    cells = json.load(file)['cells']
  found = {}
  for cell in cells:
    if cell['cell_type'] == 'code':
      exec(''.join(cell['source']), found)
  with np.load(directory.distilled) as file:
    np.testing.assert_array_equal(found['images'], file['images'])
  first, *_, last = directory.read_metrics()
  assert found['krr_real'] == first['krr_test_accuracy']
  assert found['krr_distilled'] == last['krr_test_accuracy']
  assert found['krr_distilled'] > found['krr_real'] + 0.1
  assert len(found['network_distilled']) == 3
  assert found['network_distilled'].mean() > found['network_real'].mean()
  assert found['network_distilled'].min() > 0.4  # ten classes
