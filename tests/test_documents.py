"""What the documents quote is what the code has."""

import glob
import os
import re

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def _read(*names):
  return '\n'.join(open(os.path.join(ROOT, name), encoding='utf-8').read() for name in names)


def _sources():
  """All code, with strings that go on in the next line put together."""
  names = [
    path
    for room in (
      'artifacts',
      'configs',
      'data',
      'distillation',
      'kernels',
      'nodes',
      'programs',
      'tools',
    )
    for pattern in ('*.py', '*/*.py', '*.sh')
    for path in glob.glob(os.path.join(ROOT, room, pattern))
  ]
  return re.sub(r"(['\"])\n\s*f?['\"]", '', _read('launch.py', *names))


def _quoted_messages():
  section = _read('BUILD.md').partition('## When something goes wrong')[2]
  cells = [line.split(' | ')[0] for line in section.splitlines() if line.startswith('| `')]
  return [message for cell in cells for message in re.findall('`([^`]+)`', cell)]


def test_every_message_of_the_troubleshooting_table_is_one_of_the_code():
  sources, messages = _sources().lower(), _quoted_messages()
  assert len(messages) > 40
  assert not [message for message in messages if message.lower() not in sources]


@pytest.mark.parametrize('document', ['README.md', 'BUILD.md', 'RESULTS.md'])
def test_flags_and_files_of_the_documents_exist(document):
  from configs import validation

  text = _read(document)
  for field in re.findall(r'--config\.((?:run|system)[\w.]*\w)', text) + re.findall(
    r'`((?:run|system)\.[\w.]*\w)', text
  ):
    validation.check_path(field)
  for name in re.findall(
    r'`((?:artifacts|configs|tests|data|distillation|kernels|nodes|programs|notebooks|docs)/[\w/.]*)`',
    text,
  ):
    assert os.path.exists(os.path.join(ROOT, name)), name
  for name in re.findall(r'\]\(([\w/.]+)\)', text):
    assert os.path.exists(os.path.join(ROOT, name)), name
