"""Messages, flags, files, links and commands in the documents are those of the code."""

import glob
import importlib.util
import os
import re
import textwrap

import pytest

from configs import validation

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ROOMS = (
  'artifacts',
  'configs',
  'data',
  'distillation',
  'kernels',
  'nodes',
  'programs',
  'tools',
  'transport',
)
FOLDERS = (*ROOMS, 'benchmarks', 'docs', 'notebooks', 'tests')
DOCUMENTS = sorted(
  os.path.relpath(path, ROOT)
  for pattern in ('*.md', 'docs/*.md', 'notebooks/*.ipynb')
  for path in glob.glob(os.path.join(ROOT, pattern))
)


def _read(*names: str) -> str:
  texts = []
  for name in names:
    with open(os.path.join(ROOT, name), encoding='utf-8') as file:
      texts.append(file.read())
  return '\n'.join(texts)


def _sources() -> str:
  """All code, with strings that go on in the next line put together."""
  paths = [
    path
    for room in ROOMS
    for pattern in ('**/*.py', '*.sh')
    for path in glob.glob(os.path.join(ROOT, room, pattern), recursive=True)
  ]
  return re.sub(r"(['\"])\n\s*f?['\"]", '', _read('launch.py', *paths))


def _quoted_messages() -> list[str]:
  section = _read('BUILD.md').partition('## When something goes wrong')[2]
  cells = [line.split(' | ')[0] for line in section.splitlines() if line.startswith('| `')]
  return [message for cell in cells for message in re.findall('`([^`]+)`', cell)]


def _anchors(document: str) -> set[str]:
  """The anchors that GitHub gives a document's headings."""
  headings = re.findall(r'^#+ (.*)$', _read(document), re.MULTILINE)
  return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


def _expanded(path: str) -> list[str]:
  """The paths that a shell makes of one with {a,b}."""
  found = re.search(r'\{([^{}]*)\}', path)
  if not found:
    return [path]
  before, after = path[: found.start()], path[found.end() :]
  return [name for part in found[1].split(',') for name in _expanded(before + part + after)]


def _is_program(module: str) -> bool:
  """Whether `python -m module` runs something."""
  try:
    spec = importlib.util.find_spec(module)
  except ModuleNotFoundError:  # of a package that contains it
    return False
  if spec is None:
    return False
  if spec.submodule_search_locations is not None:
    return importlib.util.find_spec(f'{module}.__main__') is not None
  if spec.origin is None or not spec.origin.startswith(ROOT + os.sep):
    return True
  with open(spec.origin, encoding='utf-8') as file:
    return "__name__ == '__main__'" in file.read()


def test_every_message_of_the_troubleshooting_table_is_one_of_the_code():
  sources, messages = _sources().lower(), _quoted_messages()
  assert len(messages) > 40
  assert not [message for message in messages if message.lower() not in sources]


@pytest.mark.parametrize('document', DOCUMENTS)
def test_fields_of_the_documents_exist(document):
  text = _read(document)
  for pattern in (r'--config\.((?:run|system)[\w.]*\w)', r'`((?:run|system)\.[\w.]*\w)'):
    for field in re.findall(pattern, text):
      validation.check_path(field)


@pytest.mark.parametrize('document', DOCUMENTS)
def test_paths_of_the_documents_exist(document):
  for quoted in re.findall(rf'`((?:{"|".join(FOLDERS)})/[\w/.,{{}}]*)`', _read(document)):
    for name in _expanded(quoted):
      assert os.path.exists(os.path.join(ROOT, name)), name


@pytest.mark.parametrize('document', DOCUMENTS)
def test_links_of_the_documents_lead_somewhere(document):
  for name, anchor in re.findall(r'\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)', _read(document)):
    linked = os.path.normpath(os.path.join(os.path.dirname(document), name)) if name else document
    assert os.path.exists(os.path.join(ROOT, linked)), name
    assert not anchor or anchor in _anchors(linked), f'{name}#{anchor}'


@pytest.mark.parametrize('document', DOCUMENTS)
def test_commands_of_the_documents_exist(document):
  text = _read(document)
  for module in re.findall(r'python3? -m\s+([\w.]*\w)', text):
    assert _is_program(module), f'python -m {module}'
  makefile = _read('Makefile')
  for target in re.findall(r'(?:`|^ +)make ([a-z][a-z-]*)', text, re.MULTILINE):
    assert re.search(rf'^{target}:', makefile, re.MULTILINE), f'make {target}'


@pytest.mark.parametrize(
  'module, runs',
  [
    ('pytest', True),
    ('benchmarks.gpu', True),
    ('data.store', False),
    ('data', False),
    ('no_such_module', False),
    ('data.no_such_module', False),
    ('no_such_package.module', False),
  ],
)
def test_only_programs_count_as_commands(module, runs):
  assert _is_program(module) == runs


def test_the_step_that_contributing_shows_is_the_code():
  for shown in re.findall(
    r'^```python\n(.*?)^```', _read('CONTRIBUTING.md'), re.DOTALL | re.MULTILINE
  ):
    assert textwrap.dedent(shown).strip() in _read('distillation/step.py')


def test_build_lists_what_one_process_needs():
  """All that a run needs but Launchpad and what several hosts need, and Neural Tangents, which is
  optional."""
  _, _, listed = _read('BUILD.md').partition('    pip install absl-py')
  wanted = re.findall(
    r'^([a-zA-Z][\w-]*)(?!.*python_version >= )', _read('requirements.in'), re.MULTILINE
  )
  optional = {'dm-launchpad', 'tensorflow-cpu', 'cryptography', 'pyyaml', 'neural-tangents'}
  assert {'absl-py', *listed.partition('\n\n')[0].replace('\\', '').split()} == (
    set(wanted) - optional
  )


def test_there_is_one_version():
  [version] = re.findall(r'^version = "(.*)"$', _read('pyproject.toml'), re.MULTILINE)
  assert re.findall(r'^## \[?([\d.]+)', _read('CHANGELOG.md'), re.MULTILINE)[0] == version
  assert not re.search('^version:', _read('CITATION.cff'), re.MULTILINE)
