"""tools/setup.sh, with a stand-in for uv that writes down how it is called."""

import os
import re
import shutil
import subprocess

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# With the folders of an interpreter, and of Launchpad, where it is asked for them.
UV = """#!/bin/sh
if [ "$1" = python ]; then
  for last; do :; done
  case " $FOUND " in *" $last "*) exit ;; *) exit 1 ;; esac
fi
mkdir -p .venv/lib/python/site-packages
case "$*" in
  *--target*) mkdir -p .venv/launchpad/launchpad .venv/launchpad/dm_launchpad-0.dist-info ;;
esac
echo "$*" >> commands
echo "$1 ${UV_CACHE_DIR:-none} ${UV_PYTHON_INSTALL_DIR:-none}" >> places
for last; do :; done
echo "$1 $last" >> calls
"""
UNAME = '[ "$1" = -s ] && echo "$SYSTEM" || echo "$MACHINE"'


@pytest.fixture
def setup(tmp_path):
  """A function that runs setup.sh in `tmp_path / 'copy'` and returns the finished process.

  It takes setup.sh's arguments, `home`, what uname says, and further variables of the environment.
  """
  copy = tmp_path / 'copy'
  (copy / 'tools').mkdir(parents=True)
  requirements = [f'requirements{extra}.txt' for extra in ('', '-dev', '-cuda')]
  for name in ('tools/setup.sh', 'tools/uv.txt', *requirements):
    shutil.copy(os.path.join(ROOT, name), copy / name)
  (tmp_path / 'home').mkdir()
  (tmp_path / 'file').touch()
  for name, content in (('uv', UV), ('uname', UNAME)):
    (tmp_path / name).write_text(content)
    (tmp_path / name).chmod(0o755)

  def run(*arguments, home='home', system='Linux', machine='x86_64', path=None, **environment):
    return subprocess.run(
      ['tools/setup.sh', *arguments],
      cwd=copy,
      env={
        'PATH': path or f'{tmp_path}:{os.environ["PATH"]}',
        'HOME': str(tmp_path / home),
        'SYSTEM': system,
        'MACHINE': machine,
        **environment,
      },
      capture_output=True,
      text=True,
      timeout=60,
      check=False,
    )

  return run


@pytest.mark.parametrize('home, usable', [('home', True), ('file', False), ('file/below', False)])
def test_uv_has_a_place_for_its_files(tmp_path, setup, home, usable):
  """A home that can be written is used, another is not."""
  done = setup(home=home)
  assert done.returncode == 0, done.stderr
  copy = tmp_path / 'copy'
  lines = [line.partition(' ') for line in (copy / 'places').read_text().splitlines()]
  assert [command for command, _, _ in lines] == ['venv', 'pip']
  places = 'none none' if usable else f'{copy}/.uv-home/cache {copy}/.uv-home/python'
  assert {rest for _, _, rest in lines} == {places}
  assert ('cannot be written: uv keeps its files in .uv-home' in done.stdout) != usable


def test_each_file_of_requirements_is_installed_once_and_again_when_it_has_changed(tmp_path, setup):
  copy = tmp_path / 'copy'

  def calls(*arguments):
    (copy / 'calls').write_text('')
    done = setup(*arguments)
    assert done.returncode == 0, done.stderr
    return (copy / 'calls').read_text().splitlines()

  base = ['venv .venv', 'pip requirements.txt']
  dev = ['pip requirements-dev.txt']
  cuda = ['pip requirements-cuda.txt']
  assert calls('dev') == base + dev
  assert calls('cuda') == cuda
  assert calls() == calls('dev') == calls('cuda') == []
  with open(copy / 'requirements-dev.txt', 'a') as file:
    file.write('# changed\n')
  assert calls('cuda') == []
  assert calls('dev') == dev
  with open(copy / 'requirements.txt', 'a') as file:
    file.write('# changed\n')
  assert calls() == base
  assert calls('dev') == dev
  assert calls('cuda') == cuda


def test_unknown_arguments_are_refused(tmp_path, setup):
  done = setup('gpu')
  assert done.returncode == 1 and "unknown argument 'gpu'" in done.stderr
  assert not (tmp_path / 'copy' / 'calls').exists()


@pytest.mark.parametrize(
  'system, machine, found, python',
  [
    ('Linux', 'x86_64', '', '3.10'),
    ('Linux', 'aarch64', '3.11 3.12', '3.12'),
    ('Linux', 'aarch64', '3.10', '3.13'),
    ('Darwin', 'arm64', '3.13 3.11', '3.13'),
  ],
)
def test_python_suits_the_machine(tmp_path, setup, system, machine, found, python):
  """3.10 where Launchpad has a wheel, else the newest one that is there."""
  done = setup(system=system, machine=machine, FOUND=found)
  assert done.returncode == 0, done.stderr
  commands = (tmp_path / 'copy' / 'commands').read_text().splitlines()
  assert f'--python {python} ' in commands[0]
  # Launchpad's own packages are there by its wheel on 3.10, by its Python files elsewhere.
  assert any('--target' in command for command in commands) == (python != '3.10')
  site = tmp_path / 'copy' / '.venv' / 'lib' / 'python' / 'site-packages'
  assert (site / 'launchpad').exists() == (site / 'kip.pth').exists() == (python != '3.10')
  if python != '3.10':
    packages = os.path.normpath(site / (site / 'kip.pth').read_text().strip())
    assert packages == str(tmp_path / 'copy' / 'packages')


def test_another_python_replaces_the_environment_and_stays(tmp_path, setup):
  copy = tmp_path / 'copy'

  def pythons(**environment):
    (copy / 'commands').write_text('')
    done = setup(**environment)
    assert done.returncode == 0, done.stderr
    return re.findall(r'venv .*--python (\S+)', (copy / 'commands').read_text())

  assert pythons() == ['3.10']
  assert pythons(KIP_PYTHON='3.10') == []
  assert pythons(KIP_PYTHON='3.12') == ['3.12']
  assert pythons() == pythons(KIP_PYTHON='3.12') == []
  assert pythons(KIP_PYTHON='3.10') == ['3.10']


@pytest.mark.parametrize(
  'python, machine, message',
  [
    ('3.9', 'x86_64', 'unknown KIP_PYTHON=3.9: allowed are 3.10, 3.11, 3.12 and 3.13.'),
    ('3.10', 'aarch64', 'KIP_PYTHON=3.10 is for Linux on x86-64'),
  ],
)
def test_pythons_that_cannot_be_had_are_refused(tmp_path, setup, python, machine, message):
  done = setup(KIP_PYTHON=python, machine=machine)
  assert done.returncode == 1 and message in done.stderr
  assert not (tmp_path / 'copy' / 'calls').exists()


def test_launchpads_files_are_those_of_the_pinned_wheel(tmp_path, setup):
  """By name, version and hashes, for another Python and machine than that wheel's."""
  assert setup(KIP_PYTHON='3.12').returncode == 0
  lines = (tmp_path / 'copy' / '.venv' / 'launchpad.txt').read_text().splitlines()
  assert lines[0] == 'dm-launchpad==0.5.2 \\'
  assert lines[1:-1] and all(re.match(r' +--hash=sha256:[0-9a-f]{64}', it) for it in lines[1:-1])
  assert lines[-1].strip().startswith('# via')


# Stands in for the Python that installs uv: makes an environment whose pip writes down how it is
# called, and installs the stand-in for uv.
PYTHON = """#!/bin/sh
[ "$1 $2" = '-m venv' ] || exit 1
mkdir -p "$3/bin"
cat > "$3/bin/python" <<'END'
#!/bin/sh
for word; do echo "$word"; done > pip-called
cp ../stand-in .uv/bin/uv
END
chmod +x "$3/bin/python"
"""


def test_uv_is_installed_by_its_hash_where_there_is_none(tmp_path, setup):
  copy = tmp_path / 'copy'
  (tmp_path / 'uv').rename(tmp_path / 'stand-in')
  (tmp_path / 'python3').write_text(PYTHON)
  (tmp_path / 'python3').chmod(0o755)
  for name in ('sh', 'cat', 'cp', 'chmod', 'mkdir', 'rm', 'dirname', 'cksum', 'sed', 'head'):
    found = shutil.which(name)
    assert found
    (tmp_path / name).symlink_to(found)
  done = setup(path=str(tmp_path))
  assert done.returncode == 0, done.stderr
  called = (copy / 'pip-called').read_text().split()
  assert called[:3] == ['-m', 'pip', 'install']
  assert {'--require-hashes', '--only-binary=:all:'} < set(called)
  assert called[-2:] == ['-r', 'tools/uv.txt']  # and no name of a package beside it
  pinned, *hashes = (copy / 'tools/uv.txt').read_text().partition('\n')[2].split(' \\\n')
  assert re.fullmatch(r'uv==[\d.]+', pinned)
  assert hashes and all(re.fullmatch(r' *--hash=sha256:[0-9a-f]{64}\n?', line) for line in hashes)


def test_the_image_runs_as_a_user_without_rights():
  with open(os.path.join(ROOT, 'Dockerfile'), encoding='utf-8') as file:
    instructions = re.findall(r'^([A-Z]+) (.*)', file.read().replace('\\\n', ''), re.MULTILINE)
  users = [value for name, value in instructions if name == 'USER']
  assert users and users[-1] not in ('root', '0')
  of_that_user = instructions[instructions.index(('USER', users[-1])) :]
  assert ('RUN', 'make $TARGETS') in of_that_user and of_that_user[-1][0] == 'CMD'
  assert 'pip install' not in ' '.join(value for _, value in instructions)  # see setup.sh
