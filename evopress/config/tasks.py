"""What lm-eval tasks are, from their YAML files alone: read before anything runs, without importing lm-eval."""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from evopress.config.evaluation import TaskSettings
from evopress.util.errors import ConfigError

_NAME = re.compile(r"^(?:task|group|tag)\s*:[ \t]*(.+)$", re.MULTILINE)
_ITEM = re.compile(r"^\s*-\s*(?:task\s*:\s*)?([^\s:#]+)\s*(?:#.*)?$", re.MULTILINE)
_INCLUDE = re.compile(r"^include\s*:\s*(.+?)\s*$", re.MULTILINE)
_GROUP = re.compile(r"^group\s*:", re.MULTILINE)
_UNSAFE = re.compile(r"^unsafe_code\s*:\s*true\b", re.MULTILINE | re.IGNORECASE)


def require_tasks(tasks: TaskSettings) -> None:
    """Check that the tasks exist, and that those which run what the model writes are wanted.

    Raises:
        ConfigError: an unknown task, or one that is not confirmed; one line each.
    """
    if not tasks.names:
        return
    texts = _read(tasks.include_path) if tasks.include_path else {}
    if not all(_is_named(name, texts) for name in tasks.names):
        standard = _standard_folder()
        if standard is None:  # told by the job, which needs it
            return
        texts = _read(standard) | texts
    unknown = [name for name in tasks.names if not _is_named(name, texts)]
    known = sorted({name for text in texts.values() for name in _names(text)}) if unknown else []
    problems = [unknown_task(name, known) for name in unknown]
    if not tasks.run_generated_code:
        unsafe = _unsafe(texts)
        problems += [runs_generated_code(name) for name in tasks.names if name in unsafe]
    if problems:
        raise ConfigError("\n".join(problems))


def unknown_task(name: str, known: Sequence[str]) -> str:
    """The message for a name that is no task; offers near ones."""
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see `lm-eval ls tasks`, or set include_path"
    return f"evaluation.tasks.names: unknown task {name!r}: {hint}"


def runs_generated_code(name: str) -> str:
    """The message for a task that is not confirmed."""
    return (
        f"evaluation.tasks.names: {name!r} runs the code that the model writes, on this machine and as you; leave it "
        "out, or set evaluation.tasks.run_generated_code: true"
    )


def _standard_folder() -> str | None:
    """Where lm-eval keeps its tasks."""
    found = find_spec("lm_eval")
    return str(Path(found.origin).parent / "tasks") if found and found.origin else None


def _read(folder: str) -> dict[str, str]:
    """Text of every file that may be YAML (what others include need not end in `.yaml`), by absolute path.

    The 14,000 files of the standard tasks are only searched as text: parsing all would take a minute.
    """
    paths = (os.path.join(where, name) for where, _, names in os.walk(os.path.realpath(folder)) for name in names)  # noqa: PTH118 (Path takes seconds)
    return {path: Path(path).read_text(encoding="utf-8", errors="replace") for path in paths if path.endswith("yaml")}


def _names(text: str) -> set[str]:
    """Tasks, groups and tags that a file names outside of lists of several lines."""
    found = (match[1].partition(" #")[0].strip().strip("[]").split(",") for match in _NAME.finditer(text))
    return {_plain(word) for words in found for word in words} - {""}


def _items(text: str) -> set[str]:
    """Entries of a file's lists: members of a group, tags, and much that names no task."""
    return {_plain(match[1]) for match in _ITEM.finditer(text)}


def _is_named(name: str, texts: Mapping[str, str]) -> bool:
    return any(name in text and name in _names(text) | _items(text) for text in texts.values())


def _plain(word: str) -> str:
    return word.strip().strip("'\"")


def _unsafe(texts: Mapping[str, str]) -> set[str]:
    """Tasks that say so or include a file that does, their tags, and groups that hold one of them."""
    names: set[str] = set()
    marked: set[str] = set()
    new = {path for path, text in texts.items() if "unsafe_code" in text and _UNSAFE.search(text)}
    while new:
        marked |= new
        names = names.union(*(_names(texts[path]) for path in new))
        names = names.union(*(_items(texts[path]) for path in new if not _GROUP.search(texts[path])))
        includable = {Path(path).name for path in marked}
        new = {
            path
            for path, text in texts.items()
            if path not in marked and (_includes(path, text, marked, includable) or _holds(text, names))
        }
    return names


def _includes(path: str, text: str, others: set[str], file_names: set[str]) -> bool:
    """Whether a file includes one of others, of which ``file_names`` are the last parts."""
    if "include:" not in text or not any(name in text for name in file_names):
        return False
    return any(os.path.realpath(Path(path).parent / _plain(match[1])) in others for match in _INCLUDE.finditer(text))


def _holds(text: str, names: set[str]) -> bool:
    """Whether a file is a group with one of these tasks."""
    return "group:" in text and any(name in text for name in names) and not names.isdisjoint(_items(text))
