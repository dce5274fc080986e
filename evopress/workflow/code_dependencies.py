"""Which files of the project a script runs: found from its import statements, without importing anything.

The workflow declares these files as inputs, so that an edited module makes exactly the stages that use it run again.
Imports are followed as Python would: to modules beside the script, and to those of the package.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = "evopress"


def code_closure(script: Path, root: Path = Path()) -> list[str]:
    """Return ``script`` and all it imports of the project, directly or not, with the data files beside those modules.

    Args:
        script: path below ``root``.
        root: folder that holds the package.

    Returns:
        Sorted paths below ``root``, as Snakemake should name them.
    """
    start = root / script
    pending, seen = [start], set()
    while pending:
        path = pending.pop()
        if path not in seen:
            seen.add(path)
            pending.extend(_imported_files(path, start.parent, root, path.stat().st_mtime_ns))
    data = {beside for module in seen - {start} for beside in _data_files(module)}
    return sorted(path.relative_to(root).as_posix() for path in seen | data)


@cache
def _imported_files(path: Path, beside: Path, root: Path, modified: int) -> tuple[Path, ...]:
    """Files of the project that ``path`` itself imports; ``modified`` only makes an edited file a new question."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    found: set[Path] = set()
    for node in _executed(tree):
        for module in _named_modules(node):
            if isinstance(node, ast.ImportFrom) and node.level:
                found.update(_module_files(module, path.parents[node.level - 1]))
            elif module.partition(".")[0] == PACKAGE:
                found.update(_module_files(module, root))
            else:
                found.update(_module_files(module, beside))
    return tuple(sorted(found))


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    """Walk the tree, leaving out what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from _executed(other)
            continue
        yield child
        yield from _executed(child)


def _named_modules(node: ast.AST) -> Iterator[str]:
    """Dotted names that an import statement may refer to; those that are no modules have no file and drop out."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = [node.module] if node.module else []
        yield from base
        yield from (".".join([*base, alias.name]) for alias in node.names)


def _module_files(module: str, folder: Path) -> Iterator[Path]:
    """File of a module below ``folder``, with the ``__init__.py`` of each package around it; none where it is not."""
    parts = module.split(".")
    for length in range(1, len(parts) + 1):
        path = folder.joinpath(*parts[:length])
        for candidate in (path / "__init__.py", path.with_suffix(".py")):
            if candidate.is_file():
                yield candidate
        if not path.is_dir():
            return


def _data_files(module: Path) -> Iterator[Path]:
    """Templates and the like: files that share the module's name, as ``report.html.j2`` beside ``report.py``."""
    yield from (path for path in module.parent.glob(f"{module.stem}.*") if path.suffix not in {".py", ".pyc"})
