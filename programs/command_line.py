"""The beginning and end of every entry point: flags, the configuration they name, plain log lines,
exit statuses."""

import logging as python_logging
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence

from absl import flags, logging
from ml_collections import config_flags

from artifacts import RunDirectoryError
from configs import validation
from data import DataError
from transport.secret import SecretError
from transport.unix_socket import CannotListen

CONFIG = config_flags.DEFINE_config_file(
  'config',
  None,
  'Configuration file, such as configs/digits.py. Set any of its fields by '
  '--config.run.FIELD=VALUE or --config.system.FIELD=VALUE (configs/schema.py lists them).',
)

_BAD_INPUT_STATUS = 2
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# Those whose flags --help prints, in this order; '' stands for the program itself.
_FLAG_MODULES = (
  'programs.start',
  '',
  'programs.status',
  'programs.hosts',
  'programs.slurm_cluster',
  'programs.kubernetes_cluster',
)
_HELP_WIDTH = 100
_PLAIN_WORDS = {
  'invalid literal for int() with base 10:': 'expected a whole number, got',
  'could not convert string to float:': 'expected a number, got',
}


class BadInput(ValueError):
  """A mistake of the user's; the message is one line."""


def parse(argv: Sequence[str], expected: str) -> None:
  """Parses all flags; with --help prints the program's own and exits.

  Args:
    argv: the command line.
    expected: the program's arguments, for messages; with '--config' if it takes a configuration.

  Raises:
    BadInput: an unknown flag or field, a bad value, or a configuration that cannot be used.
  """
  if '--help' in argv or '-h' in argv:
    _print_help(takes_config='--config' in expected)
    sys.exit(0)
  for argument in argv[1:]:
    _check_config_argument(argument)
  try:
    rest = flags.FLAGS(list(argv))
  except flags.Error as error:
    message = ' '.join(str(error).split())
    for words, plain in _PLAIN_WORDS.items():
      message = message.replace(words, plain)
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
    raise BadInput(f'unknown argument {rest[1]!r}; expected {expected}.')


def config_file() -> str:
  """The file of --config, with the argument that may follow it after a colon."""
  return config_flags.get_config_filename(flags.FLAGS['config'])  # pyright: ignore[reportAttributeAccessIssue]


def _print_help(takes_config: bool) -> None:
  modules = flags.FLAGS.flags_by_module_dict()
  own = [flags.FLAGS['config']] if takes_config else []
  own += [flag for name in _FLAG_MODULES for flag in modules.get(name or sys.argv[0], [])]
  wrapper = textwrap.TextWrapper(
    _HELP_WIDTH, initial_indent='  ', subsequent_indent='      ', break_on_hyphens=False
  )
  print(sys.modules['__main__'].__doc__)
  for flag in own:
    print(wrapper.fill(f'--{flag.name}: {flag.help}'))


def _check_config_argument(argument: str) -> None:
  """Raises BadInput if `argument` names an unknown field or a configuration file that is not
  there."""
  match = re.match(r'--(?:no)?config\.([\w.]+)', argument)
  if match:
    try:
      validation.check_path(match[1])
    except validation.ConfigError as error:
      raise BadInput(str(error)) from error
  elif argument.startswith('--config='):
    path = argument.partition('=')[2].partition(':')[0]
    if not os.path.isfile(path):
      raise BadInput(f'{argument}: there is no such file.')


def exit_with(main: Callable[[list[str]], int]) -> None:
  """Ends this process with the exit status that `main` returns for its arguments.

  A mistake of the user's, or Ctrl-C, becomes one line.
  """
  try:
    sys.exit(main(sys.argv))
  except (
    BadInput,
    CannotListen,
    DataError,
    RunDirectoryError,
    SecretError,
    validation.ConfigError,
  ) as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(_BAD_INPUT_STATUS)
  except KeyboardInterrupt:
    print('Interrupted.', file=sys.stderr)
    sys.exit(128 + signal.SIGINT)


def log_plainly() -> None:
  """Makes log lines of time and message: this project's from INFO on, others' from WARNING on."""
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  handler.setFormatter(python_logging.Formatter('%(asctime)s %(message)s', '%H:%M:%S'))
  handler.addFilter(_is_for_the_user)
  python_logging.getLogger('jax').setLevel(python_logging.WARNING)  # has a handler of its own


def _is_for_the_user(record: python_logging.LogRecord) -> bool:
  ours = record.pathname.startswith(_ROOT) and 'site-packages' not in record.pathname
  return record.levelno >= (python_logging.INFO if ours else python_logging.WARNING)
