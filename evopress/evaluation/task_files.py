"""lm-eval tasks by name, standard ones and those of a folder of your own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from lm_eval.tasks import TaskManager

from evopress.config.tasks import unknown_task
from evopress.util.errors import ConfigError, DataError
from evopress.util.retry import WAITS, is_transient, patiently

LOCAL_FORMATS = ("json", "csv", "parquet", "text")
"""Values of `dataset_path` whose `data_files` are files rather than a data set of the hub."""


class PatientManager(TaskManager):
    """lm-eval's manager, which fetches the tasks' data again where the hub does not answer."""

    def load(self, task_list: Any) -> Any:
        """Build tasks, with their data.

        Raises:
            DataError: the data are not there, cannot be read, or the hub stays away.
        """
        return patiently(lambda: super(PatientManager, self).load(task_list), WAITS, "tasks", _lasting, _away)


def _lasting(error: Exception) -> DataError | None:
    """Of lm-eval, datasets, the hub's client, or of what tasks run themselves."""
    if is_transient(error):
        return None
    return DataError(f"evaluation.tasks: cannot be loaded ({error}); check the tasks' data")


def _away(attempts: int, reason: str) -> DataError:
    return DataError(
        f"evaluation.tasks: the hub did not answer in {attempts} attempts ({reason}); try again later, or use tasks "
        "whose data are local files"
    )


@contextmanager
def task_manager(names: Sequence[str], include_path: str | None) -> Iterator[TaskManager]:
    """Yield an lm-eval manager that knows ``names``.

    Relative `data_files` of YAML tasks under ``include_path`` are found beside the YAML file, wherever the job runs
    (lm-eval alone would look in the working directory). The index of the 14,000 standard tasks takes seconds to
    build, so it is left out where the folder has all the names.

    Raises:
        ConfigError: no such folder, or an unknown name; the message offers near ones.
    """
    folder = None if include_path is None else Path(include_path)
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"evaluation.tasks.include_path: {str(folder)!r} is not a folder")
    with TemporaryDirectory(prefix="evopress-tasks-") as overlay:
        paths = [folder] if folder else []
        if folder and write_overlays(folder, Path(overlay)):
            paths.append(Path(overlay))
        manager = PatientManager(include_path=paths, include_defaults=False)
        if not set(names) <= set(manager.all_tasks):
            manager = PatientManager(include_path=paths)
        check_names(names, manager.all_tasks)
        yield manager


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """Check that every name is a task, group or tag.

    Raises:
        ConfigError: one line per unknown name.
    """
    lines = [unknown_task(name, known) for name in sorted(set(names) - set(known))]
    if lines:
        raise ConfigError("\n".join(lines))


def write_overlays(folder: Path, overlay: Path) -> int:
    """For each task of ``folder`` with relative data files, write a YAML that includes it and gives absolute ones.

    Returns:
        The number of files written.
    """
    count = 0
    for path in sorted(folder.resolve().rglob("*.yaml")):
        config = _read(path)
        arguments = config.get("dataset_kwargs")
        if not isinstance(config.get("task"), str) or config.get("dataset_path") not in LOCAL_FORMATS:
            continue
        if isinstance(arguments, dict) and "data_files" in arguments:
            files = _absolute(arguments["data_files"], path.parent)
            content = {"include": str(path), "dataset_kwargs": {**arguments, "data_files": files}}
            (overlay / f"{count}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
            count += 1
    return count


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads lm-eval's `!function` as text and runs nothing."""


_Loader.add_constructor("!function", lambda loader, node: str(node.value))


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, or nothing: what lm-eval cannot read either is left to its own message."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _absolute(files: Any, folder: Path) -> Any:
    """Make paths in lm-eval's ``data_files`` (a path, a list, or a mapping of splits to either) absolute."""
    if isinstance(files, dict):
        return {split: _absolute(paths, folder) for split, paths in files.items()}
    if isinstance(files, list):
        return [_absolute(path, folder) for path in files]
    return files if "://" in str(files) else str(folder / str(files))
