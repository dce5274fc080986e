"""The code that a stage runs: found from import statements, without importing anything, and told apart by a digest.

The workflow makes the digest a parameter of the stage's jobs, so that an edit that can change results makes exactly the
stages that use it run again. What cannot change results is left out of it: comments, docstrings, the text of messages.
"""

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

FOLDERS = {"evopress": Path(), "studies": Path("workflow")}
"""Packages of the project, with the folder below the root that holds each."""
_TEXTS = {"description", "help"}
"""Keywords of calls that only explain."""


def code_digest(modules: Iterable[str], root: Path = Path()) -> str:
    """Digest of all code that ``modules`` (dotted names) run, and of the data files beside it."""
    digest = hashlib.sha256()
    for name in code_files(modules, root):
        path = root / name
        digest.update(f"{name} {_essence(path, path.stat().st_mtime_ns)}\n".encode())
    return digest.hexdigest()[:16]


def code_files(modules: Iterable[str], root: Path = Path()) -> list[str]:
    """Files of ``modules`` and of all that they import of the project, directly or not, with data files beside them.

    A registry of plug-ins is not followed: which of them a stage uses is for the caller to name.

    Args:
        modules: dotted names.
        root: folder of the project.

    Returns:
        Sorted paths below ``root``.
    """
    pending = [file for module in modules for file in _module_files(module, root)]
    seen: set[Path] = set()
    while pending:
        path = pending.pop()
        if path not in seen:
            seen.add(path)
            pending.extend(_imported_files(path, root, path.stat().st_mtime_ns))
    data = {beside for module in seen for beside in _data_files(module)}
    return sorted(path.relative_to(root).as_posix() for path in seen | data)


@cache
def _parsed(path: Path, modified: int) -> ast.Module:
    """Syntax tree of a file; ``modified`` only makes an edited file a new question."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def _imported_files(path: Path, root: Path, modified: int) -> tuple[Path, ...]:
    """Files of the package that ``path`` itself imports; none where it is a registry."""
    tree = _parsed(path, modified)
    if path.name == "__init__.py" and any(_makes_registry(node) for node in tree.body):
        return ()
    modules = {module for node in _executed(tree) for module in _named_modules(node, path, root)}
    return tuple(sorted({file for module in modules for file in _module_files(module, root)}))


def _makes_registry(node: ast.stmt) -> bool:
    value = getattr(node, "value", None)
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "Registry"


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
            parts = _parts(path, root)
            base = ".".join([*parts[: len(parts) - node.level], *([node.module] if node.module else [])])
        yield base
        yield from (f"{base}.{alias.name}" for alias in node.names)


def _module_files(module: str, root: Path) -> Iterator[Path]:
    """File of a module of the package, with the ``__init__.py`` of each package around it."""
    parts = module.split(".")
    if parts[0] not in FOLDERS:
        return
    for length in range(1, len(parts) + 1):
        path = root / FOLDERS[parts[0]] / Path(*parts[:length])
        for candidate in (path / "__init__.py", path.with_suffix(".py")):
            if candidate.is_file():
                yield candidate


def _parts(path: Path, root: Path) -> tuple[str, ...]:
    """Parts of the dotted name of the module at ``path``."""
    below = path.relative_to(root).parts
    return next(below[len(folder.parts) :] for name, folder in FOLDERS.items() if below[len(folder.parts)] == name)


def _data_files(module: Path) -> Iterator[Path]:
    """Templates and the like: files that share the module's name, as ``report.html.j2`` beside ``report.py``."""
    yield from (path for path in module.parent.glob(f"{module.stem}.*") if path.suffix not in {".py", ".pyc"})


@cache
def _essence(path: Path, modified: int) -> str:
    """Digest of what a file does; of a data file, of all it holds."""
    if path.suffix != ".py":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    tree = _WithoutTexts().visit(ast.parse(path.read_text(encoding="utf-8")))
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


class _WithoutTexts(ast.NodeTransformer):
    """Leaves out docstrings, what is logged, and the words of errors and settings."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """Drop statements that are only texts."""
        super().generic_visit(node)
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(node, field, None)
            if isinstance(statements, list):
                setattr(node, field, [one for one in statements if not _is_text(one)])
        return node

    def visit_Raise(self, node: ast.Raise) -> Any:
        """Keep the type of an error."""
        if isinstance(node.exc, ast.Call):
            node.exc.args = [one for one in node.exc.args if not isinstance(one, ast.Constant | ast.JoinedStr)]
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> Any:
        """Drop explanations."""
        node.keywords = [one for one in node.keywords if one.arg not in _TEXTS or not _is_words(one.value)]
        return self.generic_visit(node)


def _is_words(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _is_text(statement: ast.stmt) -> bool:
    """Whether a statement is a docstring or only logs."""
    if not isinstance(statement, ast.Expr):
        return False
    call = statement.value
    logs = isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "log"
    return logs or _is_words(call)
