"""Local text: .txt (one document a file), .jsonl and .parquet (one document a row). Imports nothing heavy."""

import json
from collections.abc import Iterator
from pathlib import Path

from evopress.data.documents import Document
from evopress.util.errors import DataError

SUFFIXES = (".jsonl", ".parquet", ".txt")
_ENCODING = "utf-8-sig"
"""UTF-8, whose mark at the start of files from Windows is no text."""


def find_files(path: str) -> list[Path]:
    """Files that ``path`` (a file, a folder, searched with its subfolders, or a glob pattern) stands for, sorted.

    Raises:
        DataError: there are none.
    """
    given = Path(path)
    if given.is_file():
        if given.suffix not in SUFFIXES:
            raise DataError(f"{path}: cannot be read as text; its name must end in {', '.join(SUFFIXES)}")
        return [given]
    found = given.rglob("*") if given.is_dir() else _matches(given)
    files = sorted(file for file in found if file.suffix in SUFFIXES and file.is_file())
    if not files:
        raise DataError(
            f"{path}: is no file, and no file in it or like it ends in {', '.join(SUFFIXES)}; check the path"
        )
    return files


def _matches(pattern: Path) -> Iterator[Path]:
    """Paths like a glob pattern, which may be absolute."""
    root = Path(pattern.anchor or ".")
    try:
        yield from root.glob(str(pattern.relative_to(pattern.anchor)))
    except ValueError as error:
        raise DataError(f"{pattern}: is no glob pattern ({error})") from None


def read_files(path: str, column: str) -> Iterator[Document]:
    """Documents of all files in order; rows without text are passed over.

    Raises:
        DataError: a file cannot be read, or lacks ``column``.
    """
    files = find_files(path)
    root = Path(path) if Path(path).is_dir() else None
    for file in files:
        name = str(file.relative_to(root)) if root else file.name
        try:
            if file.suffix == ".txt":
                yield Document(name, file.read_text(encoding=_ENCODING))
            elif file.suffix == ".jsonl":
                yield from _read_jsonl(file, name, column)
            else:
                yield from _read_parquet(file, name, column)
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: is not UTF-8 text ({error})") from None
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error})") from error


def text_of(row: object, column: str, where: str) -> str:
    """The text of a row; empty where it is null.

    Raises:
        DataError: the row has no such column, or it holds no text.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: is not an object with a key {column!r}")
    if column not in row:
        raise DataError(f"{where}: has no column {column!r}, but {', '.join(map(repr, row))}; set `column`")
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: column {column!r} holds {type(value).__name__}, not text; set `column`")
    return value


def _read_jsonl(file: Path, name: str, column: str) -> Iterator[Document]:
    with file.open(encoding=_ENCODING) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{file}:{number}: is not JSON ({error})") from None
                yield Document(f"{name}:{number}", text_of(row, column, f"{file}:{number}"))


def _read_parquet(file: Path, name: str, column: str) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            if column not in table.schema_arrow.names:
                text_of(dict.fromkeys(table.schema_arrow.names), column, str(file))
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=[column]):
                for row in batch.to_pylist():
                    yield Document(f"{name}:{number}", text_of(row, column, f"{file}:{number}"))
                    number += 1
    except pa.ArrowException as error:
        raise DataError(f"{file}: is not a readable parquet file ({error})") from error
