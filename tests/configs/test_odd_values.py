"""Whatever a field holds, a configuration is valid or gets one line that names the field."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import base, validation

DEFAULTS = base.get_config().to_dict()
FIELDS = sorted(validation.flatten(DEFAULTS))
SCALARS = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(),
  st.floats(),
  st.text(max_size=8),
  st.binary(max_size=4),
  st.sampled_from(
    ['auto', 'float64', 'convnet', 'fc1', '0', '-1', '', 'nan', 10**30, -0.0, 1e308, 5e-324]
  ),
)
VALUES = st.one_of(
  SCALARS,
  st.recursive(
    SCALARS,
    lambda inner: st.one_of(
      st.lists(inner, max_size=3),
      st.tuples(inner, inner),
      st.dictionaries(st.text(max_size=6), inner, max_size=3),
      st.fixed_dictionaries(
        {
          'stages': st.lists(
            st.dictionaries(st.sampled_from(['convs', 'pool', 'x']), inner), max_size=3
          )
        },
        optional={'readout': inner, 'w_std': inner, 'b_std': inner},
      ),
    ),
    max_leaves=6,
  ),
)
LABELS = np.arange(30) % 3


def _with(path, value):
  config = copy.deepcopy(DEFAULTS)
  node = config
  *parents, leaf = path.split('.')
  for parent in parents:
    node = node[parent]
  node[leaf] = value
  return config


@pytest.mark.parametrize('field', FIELDS)
@settings(max_examples=60, deadline=None)
@given(value=VALUES)
def test_any_value_of_a_field_is_taken_or_refused_by_name(field, value):
  config = _with(field, value)
  try:
    config = validation.validate(config)
  except validation.ConfigError as error:
    assert '\n' not in str(error) and field.removeprefix('run.') in str(error)
    return
  try:
    validation.validate_with_data(config, LABELS, 3, (8, 9, 2))
  except validation.ConfigError as error:
    assert '\n' not in str(error) and 'run.' in str(error)


@settings(max_examples=300, deadline=None)
@given(
  path=st.one_of(
    st.text(max_size=20),
    st.lists(st.sampled_from(['run', 'system', 'plan', 'data', 'seed', 'x', '']), max_size=4).map(
      '.'.join
    ),
  )
)
def test_any_path_is_a_field_or_gets_a_suggestion(path):
  try:
    validation.check_path(path)
  except validation.ConfigError as error:
    assert '\n' not in str(error) and 'did you mean' in str(error)
  else:
    assert any(
      field == path or field.startswith(path + '.') for field in FIELDS
    ) or path.startswith('run.architecture.')
