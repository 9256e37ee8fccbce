"""The run-time checker of annotations that tests/conftest.py switches on."""

import beartype

# A whole number is a number, as for static checkers.
check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
