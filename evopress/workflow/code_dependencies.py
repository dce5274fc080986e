"""Which files of the project a script runs: found from its import statements, without importing anything.

The workflow declares these files as inputs, so that an edited module makes exactly the stages that use it run again.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = "evopress"


def code_closure(script: Path, root: Path = Path()) -> list[str]:
    """Return ``script`` and all it imports of the package, directly or not, with the data files beside those modules.

    Args:
        script: path below ``root``.
        root: folder that holds the package.

    Returns:
        Sorted paths below ``root``, as Snakemake should name them.
    """
    pending, seen = [root / script], set()
    while pending:
        path = pending.pop()
        if path not in seen:
            seen.add(path)
            pending.extend(_imported_files(path, root, path.stat().st_mtime_ns))
    data = {beside for module in seen for beside in _data_files(module, root)}
    return sorted(path.relative_to(root).as_posix() for path in seen | data)


@cache
def _imported_files(path: Path, root: Path, modified: int) -> tuple[Path, ...]:
    """Files of the package that ``path`` itself imports; ``modified`` only makes an edited file a new question."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    modules = {module for node in _executed(tree) for module in _named_modules(node, path, root)}
    return tuple(sorted({file for module in modules for file in _module_files(module, root)}))


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    """Walk the tree, leaving out what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from _executed(other)
            continue
        yield child
        yield from _executed(child)


def _named_modules(node: ast.AST, path: Path, root: Path) -> Iterator[str]:
    """Dotted names that an import statement may refer to; those that are no modules have no file and drop out."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = path.relative_to(root).parts
            base = ".".join([*parts[: len(parts) - node.level], *([node.module] if node.module else [])])
        yield base
        yield from (f"{base}.{alias.name}" for alias in node.names)


def _module_files(module: str, root: Path) -> Iterator[Path]:
    """File of a module of the package, with the ``__init__.py`` of each package around it."""
    parts = module.split(".")
    if parts[0] != PACKAGE:
        return
    for length in range(1, len(parts) + 1):
        path = root.joinpath(*parts[:length])
        for candidate in (path / "__init__.py", path.with_suffix(".py")):
            if candidate.is_file():
                yield candidate


def _data_files(module: Path, root: Path) -> Iterator[Path]:
    """Templates and the like: files that share the module's name, as ``report.html.j2`` beside ``report.py``."""
    if module.is_relative_to(root / PACKAGE):
        yield from (path for path in module.parent.glob(f"{module.stem}.*") if path.suffix not in {".py", ".pyc"})
