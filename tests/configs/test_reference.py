"""The reference page of all fields is that of the code."""

import pathlib

from configs import reference, schema

PAGE = pathlib.Path(__file__).parents[2] / 'docs' / 'configuration.md'


def test_the_page_is_up_to_date():
  remedy = 'run: python -m configs.reference > docs/configuration.md'
  assert PAGE.read_text(encoding='utf-8') == reference.page(), remedy


def test_every_field_has_a_row_with_its_values():
  rows = [line for line in reference.page().splitlines() if line.startswith('| `')]
  names = [row.split('`')[1] for row in rows]
  assert sorted(names) == sorted(path.rpartition('.')[2] for path in schema.leaves())
  assert '| `zca` | `False` | `True`, `False` | Whiten' in reference.page()
  assert '| `rotation` | `0.0` | number from 0 to 180 | Greatest' in reference.page()
  assert '| `nn_l2s` | `(0.001,)` | numbers, each from 0 | Weight' in reference.page()
