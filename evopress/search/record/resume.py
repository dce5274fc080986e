"""The resume folder: what a killed search needs to go on as if it had not been killed.

One log, to which each finished generation appends one line: its judgements, the parents that it chose and the random
state after it. A line counts once its end is on disk, so whatever moment the process dies, what the log holds is that
of finished generations; a last line that was cut short is dropped.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from evopress.artifacts.atomic import sync_descriptor, write_text
from evopress.search.evolution.generations import State
from evopress.search.evolution.selection import Judgement, Known
from evopress.search.minibatch import Minibatch
from evopress.search.record.effort import Effort
from evopress.search.record.trace import TraceRow
from evopress.util.errors import ArtifactError
from evopress.util.progress import log

_NOTHING = Effort()


class ResumeFolder:
    """State and trace of an unfinished search."""

    def __init__(self, folder: Path, digest: str) -> None:
        """Use ``folder`` for the search that ``digest`` identifies (settings and everything that was read)."""
        self.folder, self.digest = folder, digest
        self.log = folder / "log.jsonl"
        self._held: FileIO | None = None

    def save(self, state: State, rng: np.random.Generator, rows: list[TraceRow], spent: Effort = _NOTHING) -> None:
        """Record a finished generation, the ``rows`` that it added to the trace, and what it ``spent``.

        Raises:
            ArtifactError: the folder cannot be written.
        """
        content = {
            "generation": state.generation,
            "population": state.population.tolist(),
            "rng": rng.bit_generator.state,
            "rows": [row.record() for row in rows],
            "lengths": [row.minibatch.lengths for row in rows],
            "levels": [row.levels for row in rows],
            "tokens": spent.tokens,
            "seconds": spent.seconds,
        }
        if state.generation == 0:
            self._close()
            write_text(self.log, json.dumps({"digest": self.digest}) + "\n")
        text = json.dumps(content)
        self._append(f"{_checksum(text)} {text}\n")

    def load(self, rng: np.random.Generator) -> State | None:
        """State of the last finished generation, with ``rng`` set to go on from there.

        Returns:
            None if there is nothing to go on from; the log says so if what is there belongs to another search.
        """
        try:
            digest = self._header()["digest"]
            if digest != self.digest:
                log.info("%s: made by other settings or variants; starting anew", self.folder)
                return None
            known: Known = {}
            last = None
            for last in self._generations():
                known |= _judgements(last)
            if last is None:
                return None
            state = State(last["generation"], np.array(last["population"], dtype=np.int16), known)
            rng.bit_generator.state = last["rng"]
            self._cut()
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s: cannot be read (%r); starting anew", self.folder, error)
            return None
        return state

    def records(self, generation: int) -> list[dict]:
        """Trace up to ``generation``, as records of the TRACE schema."""
        return [row for line in self._generations() if line["generation"] <= generation for row in line["rows"]]

    def effort(self, generation: int) -> Effort:
        """What was spent up to ``generation``."""
        lines = (line for line in self._generations() if line["generation"] <= generation)
        return sum((Effort(line["tokens"], line["seconds"]) for line in lines), _NOTHING)

    def remove(self) -> None:
        """Forget the search; its artifacts are written."""
        self._close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _open(self) -> int:
        """Descriptor of the log, which is held open: should another job that was let loose on this search end first and
        remove the log, this one still has it."""
        if self._held is None:
            self._held = self.log.open("r+b", buffering=0)
        return self._held.fileno()

    def _close(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None

    def _lines(self) -> Iterator[bytes]:
        with os.fdopen(os.dup(self._open()), "rb") as stream:
            stream.seek(0)
            yield from stream

    def _header(self) -> dict[str, Any]:
        return json.loads(next(self._lines(), b""))

    def _generations(self) -> Iterator[dict[str, Any]]:
        """Finished generations, in order.

        Where two jobs were let loose on one search, both wrote the same generations: each is taken once. A line that
        was damaged is as if it were not there, and those after it wait until it has been made again.
        """
        expected = 0
        for line in islice(self._lines(), 1, None):
            if not line.endswith(b"\n"):
                return
            checksum, _, text = line.decode(errors="replace").rstrip("\n").partition(" ")
            if checksum != _checksum(text):
                log.warning("%s: damaged after generation %d; going on from there", self.log, expected - 1)
                continue
            content = json.loads(text)
            if content["generation"] == expected:
                expected += 1
                yield content

    def _append(self, line: str) -> None:
        try:
            log_file, rest = self._open(), line.encode()
            fcntl.fcntl(log_file, fcntl.F_SETFL, os.O_APPEND)  # two jobs may be let loose on one search
            while rest:
                rest = rest[os.write(log_file, rest) :]
            sync_descriptor(log_file)
        except OSError as error:
            raise ArtifactError(
                f"{self.log}: cannot be written ({error.strerror}); free space or mend permissions, then run again: "
                f"the search goes on from its last generation"
            ) from error

    def _cut(self) -> None:
        """Drop a last line that was not written to its end, so that the next one starts on a line of its own."""
        whole = sum(len(line) for line in self._lines() if line.endswith(b"\n"))
        if whole < os.fstat(self._open()).st_size:
            os.truncate(self._open(), whole)


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _judgements(generation: dict[str, Any]) -> Known:
    """What a generation found, by candidate and tokens."""
    known: Known = {}
    parts = zip(generation["rows"], generation["lengths"], generation["levels"], strict=True)
    for row, lengths, levels in parts:
        minibatch = Minibatch(tuple(row["sequences"]), tuple(lengths))
        found = Judgement(row["fitness"], tuple(row["fitness_by_sequence"]))
        known[np.array(levels, dtype=np.int16).tobytes(), minibatch] = found
    return known
