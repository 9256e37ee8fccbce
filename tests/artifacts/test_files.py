"""Files are written whole or not at all, and a full disk is waited for."""

import os
import threading

import pytest

from artifacts import RunDirectoryError, files


@pytest.mark.parametrize('fails', ['at once', 'halfway'])
def test_writing_atomically(tmp_path, fails):
  path = str(tmp_path / 'file')
  files.write_atomically(path, b'old')
  (tmp_path / 'plain').touch()
  # Who may read other new files may read these.
  assert os.stat(path).st_mode == os.stat(tmp_path / 'plain').st_mode
  os.remove(tmp_path / 'plain')

  def write(file):
    if fails == 'halfway':
      file.write(b'ne')
    raise OSError(28, 'No space left on device')

  with pytest.raises(OSError, match='No space left'):
    files.write_atomically(path, write)
  assert os.listdir(tmp_path) == ['file'] and open(path, encoding='utf-8').read() == 'old'


@pytest.mark.parametrize(
  'errors, patience, stopped, tries',
  [(0, 60.0, False, 1), (5, 60.0, False, 6), (9, 0.0, False, 1), (9, 60.0, True, 1)],
)
def test_a_write_that_fails_is_tried_again_for_a_while(caplog, errors, patience, stopped, tries):
  waits = files.Patience(patience, 0.001)
  stop, left, written = threading.Event(), [OSError(28, 'No space left on device')] * errors, []

  def write():
    written.append(len(left))
    if left:
      raise left.pop()

  if stopped:
    stop.set()
  if tries > errors:
    files.persist('the row', write, stop, waits)
    told = 'the row cannot be written (No space left on device); trying again for'
    assert caplog.text.count(told) == errors
  else:
    message = r'^the row cannot be written \(No space left on device\)\.$'
    with pytest.raises(RunDirectoryError, match=message):
      files.persist('the row', write, stop, waits)
  assert len(written) == tries
