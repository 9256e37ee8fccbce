"""Flags, the configuration they name, and plain log lines: what every entry point begins with."""

import logging as python_logging
import os
import re
import signal
import sys
import textwrap
from typing import Callable, Sequence

from absl import flags, logging
from ml_collections import config_flags

from artifacts import RunDirectoryError
from artifacts.run_directory import BAD_INPUT_STATUS
from configs import validation
from data import DataError

CONFIG = config_flags.DEFINE_config_file(
  'config',
  None,
  'Configuration file, such as configs/digits.py. Set any of its fields by '
  '--config.run.FIELD=VALUE or --config.system.FIELD=VALUE (configs/base.py tells them all).',
)

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# '': of the program itself.
_FLAG_MODULES = (
  'programs.start',
  '',
  'programs.status',
  'programs.hosts',
  'programs.slurm_cluster',
)
_HELP_WIDTH = 110
_PLAINER = {
  'invalid literal for int() with base 10:': 'expected a whole number, got',
  'could not convert string to float:': 'expected a number, got',
}


class BadInput(ValueError):
  """The user's mistake; the message is one line."""


def parse(argv: Sequence[str], expected: str) -> None:
  """Parses all flags; --help prints the program's own and ends it. Raises BadInput, which names
  what is `expected`."""
  if '--help' in argv or '-h' in argv:
    modules = flags.FLAGS.flags_by_module_dict()
    own = [flags.FLAGS['config']] if '--config' in expected else []
    own += [flag for name in _FLAG_MODULES for flag in modules.get(name or sys.argv[0], [])]
    print(sys.modules['__main__'].__doc__)
    for flag in own:
      print(
        textwrap.fill(
          f'--{flag.name}: {flag.help}',
          _HELP_WIDTH,
          initial_indent='  ',
          subsequent_indent='      ',
          break_on_hyphens=False,
        )
      )
    sys.exit(0)
  for argument in argv[1:]:
    match = re.match(r'--(?:no)?config\.([\w.]+)', argument)
    if match:
      try:
        validation.check_path(match[1])
      except validation.ConfigError as error:
        raise BadInput(str(error)) from error
    elif argument.startswith('--config=') and not os.path.isfile(
      argument.partition('=')[2].partition(':')[0]
    ):
      raise BadInput(f'{argument}: there is no such file.')
  try:
    rest = flags.FLAGS(list(argv))
  except flags.Error as error:
    message = ' '.join(str(error).split())
    for words, plainer in _PLAINER.items():
      message = message.replace(words, plainer)
    raise BadInput(message) from error
  except (
    AttributeError,
    ImportError,
    KeyError,
    NameError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
  ) as error:
    raise BadInput(
      f'the configuration cannot be used: {type(error).__name__}: {" ".join(str(error).split())}'
    ) from error
  if len(rest) > 1:
    raise BadInput(f'{rest[1]!r} is no flag; expected {expected}.')


def exit_with(main: Callable[[list[str]], int]) -> None:
  """Ends this process with the exit status that `main` returns for its arguments.

  A mistake of the user's, or Ctrl-C, becomes one line.
  """
  try:
    sys.exit(main(sys.argv))
  except (BadInput, validation.ConfigError, DataError, RunDirectoryError) as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(BAD_INPUT_STATUS)
  except KeyboardInterrupt:
    print('Interrupted.', file=sys.stderr)
    sys.exit(128 + signal.SIGINT)


def log_plainly() -> None:
  """Time and message in every process: this project's from INFO on, of others' only warnings."""
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  handler.setFormatter(python_logging.Formatter('%(asctime)s %(message)s', '%H:%M:%S'))
  handler.addFilter(_worth_reading)
  python_logging.getLogger('jax').setLevel(python_logging.WARNING)  # it has a handler of its own


def _worth_reading(record: python_logging.LogRecord) -> bool:
  ours = record.pathname.startswith(_ROOT) and 'site-packages' not in record.pathname
  return record.levelno >= (python_logging.INFO if ours else python_logging.WARNING)
