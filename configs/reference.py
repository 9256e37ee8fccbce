"""Reference page of all fields: `python -m configs.reference > docs/configuration.md`."""

import dataclasses
import textwrap
from typing import Any

from configs import schema

_HEAD = """\
# Configuration

Every field of a run, from `configs/schema.py`. A configuration file sets fields in `get_config()`;
the command line sets them by flags such as `--config.run.num_steps=500`. This page is written by
`python -m configs.reference > docs/configuration.md`. No number may be larger than 1e9 unless the
table says so.
"""

_KINDS = {bool: '`True`, `False`', int: 'whole number', float: 'number', str: 'text', tuple: ''}
_LIMITS = {'above': 'above', 'at_least': 'from', 'at_most': 'to', 'below': 'to below'}


def page() -> str:
  """The page in Markdown: a table for each group of fields."""
  return '\n'.join([_HEAD, *_sections(schema.Run(), 'run'), *_sections(schema.System(), 'system')])


def _sections(group: Any, path: str) -> list[str]:
  """Sections for a group of fields and then for the groups in it."""
  documentation = textwrap.dedent(f'  {type(group).__doc__}').strip()
  rows, inner = ['| field | default | values | meaning |', '|---|---|---|---|'], []
  for field in dataclasses.fields(group):
    if dataclasses.is_dataclass(field.default):
      inner += _sections(field.default, f'{path}.{field.name}')
    else:
      meaning = field.metadata['doc'].replace('|', r'\|')
      rows.append(f'| `{field.name}` | `{field.default!r}` | {_values(field)} | {meaning} |')
  return [f'## {path}', '', documentation, '', *rows, '', *inner]


def _values(field: 'dataclasses.Field[Any]') -> str:
  """Allowed values in words."""
  limits = field.metadata
  if 'choices' in limits:
    return ', '.join(f'`{choice}`' for choice in limits['choices'])
  words = _KINDS[type(field.default)]
  if isinstance(field.default, tuple):
    words = 'numbers, each' if limits.keys() & _LIMITS.keys() else 'steps, whole numbers from 0'
  for name, word in _LIMITS.items():
    if name in limits:
      words += f' {word} {limits[name]}'
  return f'{words}, or a dict' if limits.get('spec') else words


if __name__ == '__main__':
  print(page(), end='')
