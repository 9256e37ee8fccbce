"""Who may import whom, and what no module may reach into (CONTRIBUTING.md has the map)."""

import ast
import glob
import os
import re
from collections.abc import Iterator

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Each folder imports those before it; data and kernels know nothing of each other.
ORDER = ('configs', 'data', 'kernels', 'distillation', 'artifacts', 'nodes', 'programs')


def _files(*folders: str) -> Iterator[tuple[str, ast.Module]]:
  for folder in folders:
    for path in sorted(glob.glob(os.path.join(ROOT, folder, '**', '*.py'), recursive=True)):
      with open(path, encoding='utf-8') as file:
        yield os.path.relpath(path, ROOT), ast.parse(file.read())


def _imported(tree: ast.Module) -> Iterator[str]:
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
      yield node.module


def _names(tree: ast.Module) -> tuple[set[str], list[tuple[int, str]]]:
  """The `_names` that a file defines; those that it uses of something else, with their lines."""
  own, used = set(), []
  for node in ast.walk(tree):
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
      own.add(node.name)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
      own.add(node.id)
    elif isinstance(node, ast.Attribute):
      is_own = isinstance(node.value, ast.Name) and node.value.id in ('self', 'cls')
      own.add(node.attr) if is_own else used.append((node.lineno, node.attr))
    elif isinstance(node, ast.ImportFrom):
      used += [(node.lineno, alias.name) for alias in node.names]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):  # monkeypatch.setattr
      used += [(node.lineno, a.value) for a in node.args[1:2] if isinstance(a, ast.Constant)]
  is_private = re.compile('_[^_]').match
  return set(filter(is_private, own)), [(n, x) for n, x in used if is_private(str(x))]


@pytest.mark.xfail(reason='six imports go the other way')
def test_imports_go_one_way():
  wrong = []
  for path, tree in _files(*ORDER):
    rank = ORDER.index(path.split(os.sep)[0])
    for module in _imported(tree):
      room = module.split('.')[0]
      if room in ORDER and (ORDER.index(room) > rank or {ORDER[rank], room} == {'data', 'kernels'}):
        wrong.append(f'{path} imports {module}')
  assert not wrong, '\n'.join(wrong)


@pytest.mark.xfail(reason='tests and benchmarks still do')
def test_nothing_reaches_into_another_modules_privates():
  names = {path: _names(tree) for path, tree in _files(*ORDER, 'benchmarks', 'tests')}
  ours = set().union(*(own for own, _ in names.values()))  # other packages' privates are not meant
  wrong = [
    f'{path}:{line}: {name}'
    for path, (own, used) in names.items()
    for line, name in used
    if name in ours - own
  ]
  assert not wrong, '\n'.join(wrong)
