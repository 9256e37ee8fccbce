"""The file with a run's key: made once, and refused where others could have read it."""

import os
import stat

import pytest

from transport import secret


def test_it_is_made_once_and_for_its_owner_alone(tmp_path):
  path, before = tmp_path / 'secret', os.umask(0)
  try:
    secret.make(str(path))
  finally:
    os.umask(before)
  content = path.read_bytes()
  assert stat.S_IMODE(path.stat().st_mode) == 0o600
  secret.make(str(path))
  assert path.read_bytes() == content
  other = tmp_path / 'other'
  secret.make(str(other))
  assert secret.Secret(str(other)).certificate != secret.Secret(str(path)).certificate


@pytest.mark.parametrize('mode', [0o640, 0o604, 0o644, 0o660, 0o610])
def test_one_that_others_can_read_is_refused(tmp_path, mode):
  path = tmp_path / 'secret'
  secret.make(str(path))
  path.chmod(mode)
  with pytest.raises(secret.SecretError, match=f'open to other users .mode {mode:04o}.*chmod 600'):
    secret.Secret(str(path))


def test_one_of_another_user_is_refused(tmp_path):
  if os.geteuid() != 0:
    pytest.skip('only root can give a file away')
  path = tmp_path / 'secret'
  secret.make(str(path))
  os.chown(path, 12345, 12345)
  with pytest.raises(secret.SecretError, match='belongs to another user'):
    secret.Secret(str(path))


@pytest.mark.parametrize('keep', [0, 100, 300, -30])
def test_a_damaged_one_is_refused(tmp_path, keep):
  path = tmp_path / 'secret'
  secret.make(str(path))
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(secret.SecretError, match='is damaged'):
    secret.Secret(str(path))


def test_one_that_is_not_text_is_refused(tmp_path):
  (tmp_path / 'secret').write_bytes(b'\xff\xfe')
  (tmp_path / 'secret').chmod(0o600)
  with pytest.raises(secret.SecretError, match='it is not a text file'):
    secret.Secret(str(tmp_path / 'secret'))


def test_one_that_cannot_be_written(tmp_path):
  with pytest.raises(secret.SecretError, match='cannot be written: No such file or directory'):
    secret.make(str(tmp_path / 'nowhere' / 'secret'))
