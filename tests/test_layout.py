"""The order of imports, and what no module may reach into (CONTRIBUTING.md has the map)."""

import ast
import glob
import os
import re
from collections.abc import Iterator

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# A module imports its own folder and the lines before its own.
LAYERS = (
  ('kernels.architectures', 'kernels.contract', 'kernels.cpus', 'transport'),
  ('configs.schema',),
  ('data', 'kernels'),
  ('distillation',),
  ('configs',),
  ('artifacts',),
  ('nodes',),
  ('programs',),
)
FOLDERS = sorted({name.partition('.')[0] for layer in LAYERS for name in layer})


def _files(*folders: str) -> Iterator[tuple[str, ast.Module]]:
  for folder in folders:
    for path in sorted(glob.glob(os.path.join(ROOT, folder, '**', '*.py'), recursive=True)):
      with open(path, encoding='utf-8') as file:
        yield os.path.relpath(path, ROOT), ast.parse(file.read())


def _imported(tree: ast.Module) -> Iterator[str]:
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def _layer(module: str) -> int:
  """The index of a module's layer, or -1 if it is of another package."""
  for i, layer in enumerate(LAYERS):
    if any(f'{module}.'.startswith(f'{name}.') for name in layer):
      return i
  return -1


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


def test_imports_go_one_way():
  wrong = []
  for path, tree in _files(*FOLDERS):
    own = _layer(path.removesuffix('.py').replace(os.sep, '.'))
    folder = path.partition(os.sep)[0]
    for module in _imported(tree):
      layer = _layer(module)
      if layer > own or (layer == own and module.partition('.')[0] != folder):
        wrong.append(f'{path} imports {module}')
  assert not wrong, '\n'.join(wrong)


def test_only_the_reference_needs_neural_tangents():
  importers = {
    name: [
      path for path, tree in _files(*FOLDERS) if any(m.startswith(name) for m in _imported(tree))
    ]
    for name in ('neural_tangents', 'kernels.reference')
  }
  assert importers == {
    'neural_tangents': ['kernels/reference.py'],
    'kernels.reference': ['kernels/registry.py'],
  }


def test_nothing_reaches_into_another_modules_privates():
  names = {path: _names(tree) for path, tree in _files(*FOLDERS, 'benchmarks', 'tests')}
  ours = set().union(*(own for own, _ in names.values()))  # other packages' privates are not meant
  wrong = [
    f'{path}:{line}: {name}'
    for path, (own, used) in names.items()
    for line, name in used
    if name in ours - own
  ]
  assert not wrong, '\n'.join(wrong)
