"""Documents, as every source of text hands them on, and local files as documents.

Local text is .txt, .md, .rst (one document a file), .jsonl or .parquet (one document a row). Imports nothing heavy.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from evopress.util.errors import DataError

T = TypeVar("T")
SUFFIXES = (".jsonl", ".parquet", ".txt")
"""Endings of files that a folder or a pattern gives."""
TEXT_SUFFIXES = (".txt", ".md", ".rst")
"""Endings of plain text. All but the first must be named, by a file or a pattern: beside data, they are about it."""
ENCODING = "utf-8-sig"
"""UTF-8, whose mark at the start of files from Windows is no text."""
_BATCH = 1024
"""Rows of a parquet file that are held at a time."""


class Document(NamedTuple):
    """One document; ``name`` says where it comes from, as in ``file.jsonl:12``."""

    name: str
    text: str


class Passage(NamedTuple):
    """A piece from somewhere in a long text, of which no more than one window is taken."""

    name: str
    text: str


class Conversation(NamedTuple):
    """Messages between a user and an assistant, to be put into words by the model's chat template."""

    name: str
    messages: Sequence[Mapping[str, Any]]


AnyDocument = Document | Passage | Conversation


@dataclass(frozen=True)
class Corpus:
    """The documents of one role, in the order of their source."""

    source: str
    """What error messages call it."""
    documents: Iterable[AnyDocument]
    order: Literal["text", "windows", "stream"] = "windows"
    """What the seed chooses: nothing (more), windows of the whole text, or documents of a stream too long to be read
    whole."""
    usual_windows: int | None = None
    """Windows that the field's tables take, where the settings do not say how many tokens; None is all."""
    whole: Iterable[AnyDocument] | None = None
    """All of the text, where ``documents`` leave something out; read if they do not suffice."""


def shuffled(items: Iterable[T], buffer: int, rng: np.random.Generator) -> Iterator[T]:
    """Yield all items in random order, holding only ``buffer`` of them: each slot is refilled from the stream."""
    held: list[T] = []
    for item in items:
        if len(held) < buffer:
            held.append(item)
            continue
        slot = int(rng.integers(buffer))
        yield held[slot]
        held[slot] = item
    for slot in rng.permutation(len(held)):
        yield held[slot]


class Column(NamedTuple):
    """What is read of a row."""

    name: str = "text"
    messages: bool = False
    """Whether it holds conversations, as lists of messages with `role` and `content`."""


TEXT = Column()


def find_files(path: str) -> list[Path]:
    """Files that ``path`` (a file, a folder, searched with its subfolders, or a glob pattern) stands for, sorted.

    Raises:
        DataError: there are none.
    """
    given = Path(path)
    if given.is_file():
        if given.suffix not in (*SUFFIXES, *TEXT_SUFFIXES):
            endings = ", ".join(dict.fromkeys((*SUFFIXES, *TEXT_SUFFIXES)))
            raise DataError(f"{path}: cannot be read as text; its name must end in {endings}")
        return [given]
    found: Iterable[Path] = given.rglob("*") if given.is_dir() else _matches(given)
    named = (given.suffix,) if given.suffix in TEXT_SUFFIXES and not given.is_dir() else ()
    suffixes = (*SUFFIXES, *named)
    files = sorted(file for file in found if file.suffix in suffixes and file.is_file())
    if not files and given.is_dir():
        raise DataError(
            f"{path}: no file in it ends in {', '.join(SUFFIXES)}; name text in .md or .rst by a pattern, as in "
            f"{given / '**' / '*.md'}, and give copies of other text one of these endings"
        )
    if not files:
        raise DataError(
            f"{path}: is no file or folder, and no file like it ends in {', '.join(suffixes)}; check the path"
        )
    return files


def _matches(pattern: Path) -> Iterator[Path]:
    """Paths like a glob pattern, which may be absolute."""
    root = Path(pattern.anchor or ".")
    try:
        yield from root.glob(str(pattern.relative_to(pattern.anchor)))
    except ValueError as error:
        raise DataError(f"{pattern}: is no glob pattern ({error})") from None


def named_files(path: str) -> list[tuple[str, Path]]:
    """The same files, each with the name that its documents begin with.

    Raises:
        DataError: there are none.
    """
    root = Path(path) if Path(path).is_dir() else None
    return [(str(file.relative_to(root)) if root else file.name, file) for file in find_files(path)]


def read_files(path: str, column: Column = TEXT, most: int | None = None) -> Iterator[AnyDocument]:
    """Documents of all files in order; rows without text are passed over.

    Args:
        path: a file, a folder or a glob pattern.
        column: what to read of rows.
        most: characters that are read of a text file; None are all.

    Raises:
        DataError: a file cannot be read, or lacks ``column``.
    """
    for name, file in named_files(path):
        with told(file):
            if file.suffix in TEXT_SUFFIXES:
                if column.messages:
                    raise DataError(f"{file}: `messages: true` reads conversations from .jsonl or .parquet alone")
                with file.open(encoding=ENCODING) as text:
                    yield Document(name, text.read(-1 if most is None else most))
            elif file.suffix == ".jsonl":
                with file.open(encoding=ENCODING) as lines:
                    for number, line in enumerate(lines, start=1):
                        if line.strip():
                            row = row_of_line(line, f"{file}:{number}")
                            yield row_document(f"{name}:{number}", row, column, f"{file}:{number}")
            else:
                for number, row in read_parquet(file, column):
                    yield row_document(f"{name}:{number}", row, column, f"{file}:{number}")


@contextmanager
def told(file: Path) -> Iterator[None]:
    """Tell what is wrong with a file in one line.

    Raises:
        DataError: it is not what its name says, or cannot be read.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 text ({error})") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error})") from error


def row_of_line(line: str, where: str) -> object:
    """A row of a .jsonl file.

    Raises:
        DataError: it is not JSON.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON ({error})") from None


def row_document(name: str, row: object, column: Column, where: str) -> AnyDocument:
    """The document of a row; empty where the column is null.

    Raises:
        DataError: the row has no such column, or it holds something else.
    """
    value = _value(row, column.name, where)
    if column.messages:
        return Conversation(name, messages_of(value, f"{where}: column {column.name!r}"))
    if value is None:
        return Document(name, "")
    if not isinstance(value, str):
        if _like_messages(value):
            raise DataError(f"{where}: column {column.name!r} holds a conversation; {_USE_MESSAGES}")
        raise DataError(f"{where}: column {column.name!r} holds {type(value).__name__}, not text; set `column`")
    return Document(name, value)


def messages_of(value: object, where: str) -> list[dict[str, object]]:
    """Messages of a conversation, without keys that are null (parquet gives every message all keys).

    Raises:
        DataError: these are no messages.
    """
    if value is None or value == []:
        return []
    if not _like_messages(value):
        raise DataError(
            f"{where} holds no conversation: with `messages: true` it must be a list of messages, each with the keys "
            "'role' and 'content'"
        )
    assert isinstance(value, list)
    return [{key: part for key, part in message.items() if part is not None} for message in value]


_USE_MESSAGES = (
    "set `messages: true` to put conversations through the model's chat template, or write them out as text first"
)


def _value(row: object, name: str, where: str) -> object:
    if not isinstance(row, dict):
        raise DataError(f"{where}: is not an object with a key {name!r}")
    if name not in row:
        chats = [key for key, value in row.items() if _like_messages(value)]
        hint = f"column {chats[0]!r} holds a conversation: {_USE_MESSAGES}" if chats else "set `column`"
        raise DataError(f"{where}: has no column {name!r}, but {', '.join(map(repr, row))}; {hint}")
    value: object = row[name]
    return value


def _like_messages(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, Mapping) and {"role", "content"} <= set(message) for message in value)
    )


def read_parquet(
    file: Path, column: Column, group: int | None = None, first: int = 0, only: Collection[int] | None = None
) -> Iterator[tuple[int, object]]:
    """Rows of a parquet file with their numbers, some at a time.

    Args:
        file: its path.
        column: the only one that is read.
        group: the only row group that is read; None are all.
        first: number of the first row of the group.
        only: numbers of the rows that are wanted; None are all.

    Raises:
        DataError: it cannot be read, or lacks the column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            if column.name not in table.schema_arrow.names:
                _value(dict.fromkeys(table.schema_arrow.names), column.name, str(file))
            last = max(only) if only else None
            groups = None if group is None else [group]
            for batch in table.iter_batches(batch_size=_BATCH, columns=[column.name], row_groups=groups):
                numbers = range(first, first + len(batch))
                first += len(batch)
                if only is None:
                    yield from zip(numbers, batch.to_pylist(), strict=True)
                else:
                    for number in (number for number in numbers if number in only):
                        yield number, batch.slice(number - numbers.start, 1).to_pylist()[0]
                if last is not None and first > last:
                    return
    except pa.ArrowException as error:
        raise DataError(f"{file}: is not a readable parquet file ({error})") from error


def row_groups(file: Path, column: Column) -> tuple[list[int], int]:
    """Rows of each row group of a parquet file, and the bytes of a column in all of them before compression.

    Raises:
        DataError: it cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            groups = [table.metadata.row_group(index) for index in range(table.metadata.num_row_groups)]
            parts = [group.column(index) for group in groups for index in range(group.num_columns)]
            size = sum(part.total_uncompressed_size for part in parts if _belongs(part.path_in_schema, column.name))
            return [group.num_rows for group in groups], size
    except pa.ArrowException as error:
        raise DataError(f"{file}: is not a readable parquet file ({error})") from error


def _belongs(path: str, column: str) -> bool:
    """Whether a leaf of a parquet schema is a column or a part of it."""
    return path == column or path.startswith(f"{column}.")
