"""Locks of a run directory, and its small files."""

import json
import os

import pytest

from artifacts import RunDirectoryError, run_directory
from configs import schema


def test_what_a_killed_writer_left_is_swept(tmp_path):
  directory = run_directory.RunDirectory(str(tmp_path))
  os.makedirs(directory.snapshots)
  for folder in (directory.path, directory.snapshots):
    open(os.path.join(folder, '.writing-x'), 'w', encoding='utf-8').close()
  with directory.claim():
    assert os.listdir(directory.snapshots) == []


def test_two_coordinators_do_not_write_at_once(tmp_path):
  os.makedirs(tmp_path / 'snapshots')
  first, second = (run_directory.RunDirectory(str(tmp_path)) for _ in range(2))
  with (
    first.claim(),
    pytest.raises(
      run_directory.RunDirectoryError, match='has another coordinator that is still going'
    ),
  ):
    second.claim(handover=0.3)
  second.claim().close()


@pytest.mark.parametrize(
  'content, rows',
  [
    ('[{"kind": "real", "krr_test_mse": 0.5}]', [{'kind': 'real', 'krr_test_mse': 0.5}]),
    ('[]', []),
    ('{"kind": ', None),
    ('{"kind": "real"}', None),
    ('[{"krr_test_mse": 0.5}]', None),
    ('[3]', None),
    ('null', None),
    ('', None),
  ],
)
def test_baselines_are_whole_or_none(tmp_path, content, rows):
  directory = run_directory.RunDirectory(str(tmp_path))
  assert directory.read_baselines() is None
  (tmp_path / 'baselines.json').write_text(content)
  assert directory.read_baselines() == rows


def test_a_key_of_data_that_is_a_path_is_refused(tmp_path):
  saved = run_directory.Saved(schema.Config(), f'{0:032x}-zca0.1')
  assert run_directory.Saved.from_dict(saved.to_dict()) == saved
  directory = run_directory.RunDirectory(str(tmp_path))
  bad = {**saved.to_dict(), 'data_key': '../../x'}
  (tmp_path / 'config.json').write_text(json.dumps(bad))
  with pytest.raises(RunDirectoryError, match="config.json cannot be read .'../../x' is no name"):
    directory.read_config()


def test_a_directory_of_a_version_with_other_system_fields_can_be_read(tmp_path):
  """A field of `run` that is unknown would change the run: then it cannot."""
  saved = run_directory.Saved(schema.Config(), f'{0:032x}-standard')
  values = saved.to_dict()
  values['system']['accept_open_port'] = True
  assert run_directory.Saved.from_dict(values) == saved
  values['run']['momentum'] = 0.9
  with pytest.raises(TypeError, match='momentum'):
    run_directory.Saved.from_dict(values)
