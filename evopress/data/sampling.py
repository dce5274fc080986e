"""Random pieces from all over local files, at a cost that follows what is asked for rather than the size of the files.

Each file is parted into slots of nearly equal size, which are visited in random order. A document belongs to the slot
in which it begins. Of one that takes much more than a window, there are passages in slots of their own, each good for
one window, so that a long document is not all that a small sample sees. Slots are read only while tokens are wanted.
"""

import bisect
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from evopress.data.documents import (
    ENCODING,
    TEXT_SUFFIXES,
    AnyDocument,
    Column,
    Document,
    Passage,
    read_parquet,
    row_document,
    row_groups,
    row_of_line,
    told,
)
from evopress.util.errors import DataError

SMALL = 1_000_000
"""Bytes of text up to which windows of the whole text are chosen from: that takes no second."""
SPARE = 8
"""The same in bytes for each token that is asked for; of more, most would be tokenized for nothing."""
PASSAGE = 8
"""Bytes (or characters) of a passage for each token of a window. Few tokenizers need more for a token on average."""
_NEAR = 1 << 10
"""Bytes within which a passage looks for a line or a word to begin with."""
_BLOCK = 1 << 16
"""Bytes that are read at a time on the way back to the start of a line."""


class Slots(Protocol):
    """A file in slots."""

    count: int
    """Number of slots."""

    def read(self, slots: Sequence[int]) -> Iterator[tuple[int, AnyDocument]]:
        """Documents of some slots, which are in ascending order, each with its slot."""


def text_bytes(files: Iterable[Path], column: Column) -> int:
    """Size of all texts, as far as it can be told without reading them.

    Raises:
        DataError: a file cannot be read.
    """
    total = 0
    for file in files:
        with told(file):
            total += row_groups(file, column)[1] if file.suffix == ".parquet" else file.stat().st_size
    return total


def is_small(size: int, tokens: int) -> bool:
    """Whether ``size`` bytes of text are little enough to be tokenized as a whole for so many tokens."""
    return size <= max(SMALL, SPARE * tokens)


def sampled(
    files: Sequence[tuple[str, Path]], column: Column, length: int, tokens: int, rng: np.random.Generator
) -> Iterator[AnyDocument]:
    """Documents and passages of all files in random order, read as they are asked for.

    Args:
        files: names and paths.
        column: what to read of rows.
        length: tokens of a window.
        tokens: how many are wanted; slots are read together, as many as that may take.
        rng: draws the order; the same one gives the same documents.

    Raises:
        DataError: a file cannot be read, or a row lacks the column.
    """
    parts = [_slots(name, path, column, length) for name, path in files]
    ends = list(itertools.accumulate(part.count for part in parts))
    order = shuffled_range(ends[-1], rng)
    while batch := list(itertools.islice(order, 1 + tokens // length)):
        held: dict[int, list[AnyDocument]] = {slot: [] for slot in batch}
        # Slots of a file are read in its order, so that a group of rows is decoded once for all of them.
        for index, group in itertools.groupby(sorted(batch), lambda slot: bisect.bisect_right(ends, slot)):
            first = ends[index] - parts[index].count
            with told(files[index][1]):
                for slot, document in parts[index].read([slot - first for slot in group]):
                    held[first + slot].append(document)
        for slot in batch:
            yield from held.pop(slot)


def shuffled_range(count: int, rng: np.random.Generator) -> Iterator[int]:
    """Numbers below ``count`` in random order; of the first half of them, only those that were drawn are held."""
    drawn: set[int] = set()
    while 2 * len(drawn) < count:
        number = int(rng.integers(count))
        if number not in drawn:
            drawn.add(number)
            yield number
    yield from rng.permutation([number for number in range(count) if number not in drawn]).tolist()


def _slots(name: str, path: Path, column: Column, length: int) -> Slots:
    if path.suffix in TEXT_SUFFIXES:
        return TextSlots(name, path, column, length)
    if path.suffix == ".jsonl":
        return LineSlots(name, path, column, length)
    return RowSlots(name, path, column, length)


class TextSlots:
    """A text file: one document if it fits into one slot, else passages."""

    def __init__(self, name: str, path: Path, column: Column, length: int) -> None:
        """Part a file into slots of the size of a passage.

        Raises:
            DataError: conversations are wanted.
        """
        if column.messages:
            raise DataError(f"{path}: `messages: true` reads conversations from .jsonl or .parquet, not .txt")
        self.name, self.path, self.size = name, path, PASSAGE * length
        self.bytes = path.stat().st_size
        self.count = -(-self.bytes // self.size)

    def read(self, slots: Sequence[int]) -> Iterator[tuple[int, AnyDocument]]:
        """Documents or passages (`Slots`)."""
        with self.path.open("rb") as file:
            for slot in slots:
                begin, end = (self._edge(file, number * self.size) for number in (slot, slot + 1))
                file.seek(begin)
                text = io.TextIOWrapper(io.BytesIO(file.read(end - begin)), ENCODING).read()
                yield slot, Document(self.name, text) if self.count == 1 else Passage(f"{self.name}@{begin}", text)

    def _edge(self, file: io.BufferedReader, place: int) -> int:
        """Where the slot that begins at ``place`` really does: after a line, else after a word, else a character."""
        if place <= 0 or place >= self.bytes:
            return min(max(place, 0), self.bytes)
        file.seek(place)
        near = file.read(min(_NEAR, self.size))
        for mark in (b"\n", b" "):
            if (found := near.find(mark)) >= 0:
                return place + found + 1
        inside = (offset for offset, byte in enumerate(near) if byte & 0xC0 != 0x80)
        return place + next(inside, 0)  # UTF-8 continues a character with bytes 10xxxxxx


class LineSlots:
    """A file of JSON lines: rows in the slots in which they begin, or passages of longer ones."""

    def __init__(self, name: str, path: Path, column: Column, length: int) -> None:
        """Part a file into slots of a byte for each token of a window: several make a window of short rows."""
        self.name, self.path, self.column, self.size = name, path, column, length
        self.bytes = path.stat().st_size
        self.count = -(-self.bytes // self.size)

    def read(self, slots: Sequence[int]) -> Iterator[tuple[int, AnyDocument]]:
        """Documents and passages (`Slots`)."""
        with self.path.open("rb") as file:
            for slot in slots:
                begin, end = slot * self.size, (slot + 1) * self.size
                if not self._to_line(file, begin):
                    if slot % PASSAGE == 0 and not self.column.messages:
                        yield from ((slot, passage) for passage in self._inside(file, begin))
                    continue
                while (place := file.tell()) < end and (line := self._row(file)):
                    if line.strip():
                        where = f"{self.path}: the row at byte {place}"
                        row = row_of_line(line.decode(ENCODING), where)
                        yield slot, row_document(f"{self.name}@{place}", row, self.column, where)

    def _to_line(self, file: io.BufferedReader, begin: int) -> bool:
        """Go to the first line that begins in the slot at ``begin``, if one does."""
        file.seek(max(0, begin - 1))
        return not begin or file.readline(self.size + 1).endswith(b"\n")

    def _row(self, file: io.BufferedReader) -> bytes:
        """The next line; none, if it is so long that slots inside it give its passages."""
        if self.column.messages:  # a conversation is not cut
            return file.readline()
        most = PASSAGE * self.size
        line = file.readline(most + 1)
        return line if len(line) <= most or line.endswith(b"\n") else b""

    def _inside(self, file: io.BufferedReader, begin: int) -> Iterator[Passage]:
        """The passage at ``begin`` of a row, if the row is a long one."""
        start = self._line_start(file, begin)
        file.seek(start)
        line = file.readline()
        if len(line) <= PASSAGE * self.size + 1:
            return
        where = f"{self.path}: the row at byte {start}"
        document = row_document(self.name, row_of_line(line.decode(ENCODING), where), self.column, where)
        assert isinstance(document, Document)
        share = len(document.text) / len(line)
        first, last = (int((place - start) * share) for place in (begin, begin + PASSAGE * self.size))
        yield Passage(f"{self.name}@{start}+{first}", document.text[first:last])

    @staticmethod
    def _line_start(file: io.BufferedReader, place: int) -> int:
        """First byte of the line that holds the byte at ``place``."""
        while place:
            block = min(_BLOCK, place)
            file.seek(place - block)
            if (found := file.read(block).rfind(b"\n")) >= 0:
                return place - block + found + 1
            place -= block
        return 0


class RowSlots:
    """A parquet file: runs of rows, or parts of long ones."""

    def __init__(self, name: str, path: Path, column: Column, length: int) -> None:
        """Part a file into slots that hold a byte for each token of a window on average, or a passage.

        Raises:
            DataError: it cannot be read.
        """
        self.name, self.path, self.column, self.longest = name, path, column, PASSAGE * length
        groups, size = row_groups(path, column)
        self.ends = list(itertools.accumulate(groups))
        rows = sum(groups)
        self.rows = max(1, length * rows // max(1, size))
        """Rows of a slot."""
        self.parts = 1 if column.messages else max(1, size // max(1, rows) // self.longest)
        """Slots of a row, where rows are long."""
        self.count = -(-rows // self.rows) * self.parts

    def read(self, slots: Sequence[int]) -> Iterator[tuple[int, AnyDocument]]:
        """Documents and passages (`Slots`)."""
        wanted: dict[int, list[int]] = {}
        for slot in slots:
            first = slot // self.parts * self.rows
            for number in range(first, min(first + self.rows, self.ends[-1])):
                wanted.setdefault(number, []).append(slot)
        for group, numbers in itertools.groupby(wanted, lambda number: bisect.bisect_right(self.ends, number)):
            first = self.ends[group - 1] if group else 0
            for number, row in read_parquet(self.path, self.column, group, first, set(numbers)):
                document = row_document(f"{self.name}:{number}", row, self.column, f"{self.path}:{number}")
                for slot in wanted[number]:
                    yield from ((slot, part) for part in self._part(document, slot % self.parts))

    def _part(self, document: AnyDocument, part: int) -> Iterator[AnyDocument]:
        """A part of a long row; short ones are wholly in their first part."""
        if self.parts == 1 or not isinstance(document, Document) or len(document.text) <= self.longest:
            if part == 0:
                yield document
            return
        first, last = (len(document.text) * number // self.parts for number in (part, part + 1))
        yield Passage(f"{document.name}+{first}", document.text[first : min(last, first + self.longest)])
