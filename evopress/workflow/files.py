"""Files of the user's own that a stage reads: inputs of its jobs, so that a changed file makes them run again."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from evopress.compression.base import Method
from evopress.config.data import FileText, TextSettings
from evopress.config.evaluation import TaskSettings
from evopress.config.model import ModelSettings
from evopress.data.documents import find_files
from evopress.search.base import Strategy
from evopress.search.strategies.imported import Imported
from evopress.util.errors import ConfigError, DataError, ModelError

_NOT_LITERAL = re.compile(r"[{}\n\r]|<[a-z][a-z0-9_]*>")
"""Wildcards, variables and line breaks: Snakemake would look for another file."""


def model_files(model: ModelSettings) -> list[str]:
    """The GGUF file or the files of the folder; none of a model that is fetched.

    Raises:
        ModelError: there are none. (Snakemake would not mind while what it made of them earlier is there.)
    """
    if (path := model.local) is None:
        return []
    if not (found := _listed(path.glob("*") if path.is_dir() else [path])):
        raise ModelError(f"model.path: {str(path)!r} is not there, or empty; check the path")
    return found


def text_files(text: TextSettings, where: str) -> list[str]:
    """Files of local text, which the settings have at ``where``; none of a data set that is fetched.

    Raises:
        DataError: there are none where the settings say.
    """
    try:
        return _listed(find_files(text.path)) if isinstance(text, FileText) else []
    except DataError as error:
        raise DataError(f"{where}.path: {error}") from None


def task_files(tasks: TaskSettings) -> list[str]:
    """Files of the folder of own tasks: inputs of their evaluation, so that an edited task runs again.

    Raises:
        ConfigError: there is no such folder.
    """
    if tasks.include_path is None:
        return []
    folder = Path(tasks.include_path)
    if not folder.is_dir():
        raise ConfigError(f"evaluation.tasks.include_path: {tasks.include_path!r} is not a folder")
    return _listed(path for path in folder.rglob("*") if "__pycache__" not in path.parts)


def search_files(search: Strategy, where: str) -> list[str]:
    """The file of a configuration that is imported from one: an edited one is imported again.

    Raises:
        ConfigError: it is not there.
    """
    return _named({"file": search.file} if isinstance(search, Imported) and search.file is not None else {}, where)


def variants_files(method: Method, where: str) -> list[str]:
    """Files that variants are made from, as an imatrix: other content makes them anew.

    Raises:
        ConfigError: one is not there.
    """
    return _named(method.files(), where)


def _named(files: Mapping[str, str], where: str) -> list[str]:
    """Files by the setting that names each."""
    for setting, path in files.items():
        if not Path(path).is_file():
            raise ConfigError(f"{where}.{setting}: {path!r} is not there; check the path")
    return _literal([Path(path).as_posix() for path in files.values()])


def _listed(paths: Iterable[Path]) -> list[str]:
    return _literal(sorted(path.as_posix() for path in paths if path.is_file() and not path.name.startswith(".")))


def _literal(found: list[str]) -> list[str]:
    """Paths that Snakemake takes as they are."""
    for path in found:
        if odd := _NOT_LITERAL.search(path):
            raise ConfigError(
                f"{path!r}: Snakemake cannot take {odd[0]!r} in a path literally; rename the file or folder"
            )
    return found
