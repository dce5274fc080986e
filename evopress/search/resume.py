"""The resume folder: what a killed search needs to go on as if it had not been killed.

One log, to which each finished generation appends one line: its evaluations, the parents that it chose and the random
state after it. A line counts once its end is on disk, so whatever moment the process dies, what the log holds is that
of finished generations; a last line that was cut short is dropped. The first process of a search reads and writes the
log, and tells the others what it has read.
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
from evopress.search.evaluation import Effort, Evaluation, Incumbent, Minibatch, SearchResult, TraceRow
from evopress.search.processes import Ranks
from evopress.search.selection import Known, State
from evopress.util.errors import ArtifactError
from evopress.util.progress import log

_NOTHING = Effort()


class ResumeFolder:
    """State and trace of an unfinished search."""

    def __init__(self, folder: Path, digest: str, ranks: Ranks | None = None) -> None:
        """Use ``folder`` for the search that ``digest`` identifies (settings and everything that was read)."""
        self.folder, self.digest, self.ranks = folder, digest, ranks or Ranks()
        self.log = folder / "log.jsonl"
        self._held: FileIO | None = None
        self._records: list[dict[str, Any]] = []
        self._effort = _NOTHING
        self.incumbents: list[Incumbent] = []
        """The best after each finished generation, the same in all processes."""

    def save(self, state: State, rng: np.random.Generator, rows: list[TraceRow], spent: Effort = _NOTHING) -> None:
        """Record a finished generation, the ``rows`` that it added to the trace, and what it ``spent``.

        Raises:
            ArtifactError: the folder cannot be written.
        """
        records = [row.record() for row in rows]
        self._records += records
        self._effort += spent
        self.incumbents.append(Incumbent(state.generation, state.parent, self._effort))
        if self.ranks.rank > 0:
            return
        content = {
            "generation": state.generation,
            "population": state.population.tolist(),
            "rng": rng.bit_generator.state,
            "rows": records,
            "lengths": [row.minibatch.lengths for row in rows],
            "precise": [row.minibatch.precise for row in rows],
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
        """State of the last finished generation, the same in all processes, with ``rng`` set to go on from there.

        Returns:
            None if there is nothing to go on from; the log says so if what is there belongs to another search.
        """
        self._records, self._effort, self.incumbents = [], _NOTHING, []
        saved = self._saved() if self.ranks.rank == 0 else []
        finished = [json.loads(line) for line in self.ranks.share("\n".join(map(json.dumps, saved))).splitlines()]
        if not finished:
            return None
        known: Known = {}
        for generation in finished:
            known |= _evaluations(generation)
            self._records += generation["rows"]
            self._effort += Effort(generation["tokens"], generation["seconds"])
            best = np.array(generation["population"][0], dtype=np.int16)
            self.incumbents.append(Incumbent(generation["generation"], best, self._effort))
        last = finished[-1]
        rng.bit_generator.state = last["rng"]
        return State(last["generation"], np.array(last["population"], dtype=np.int16), known)

    def result(self, state: State) -> SearchResult:
        """The best of the last state, with all that was recorded on the way to it."""
        return SearchResult(state.parent, list(self._records), self._effort)

    def remove(self) -> None:
        """Forget the search; its artifacts are written."""
        self._close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _saved(self) -> list[dict[str, Any]]:
        """Finished generations of this very search that can be read."""
        try:
            digest = self._header()["digest"]
            if digest != self.digest:
                log.info("%s: made by other settings or variants; starting anew", self.folder)
                return []
            finished = list(self._generations())
            for generation in finished:
                _evaluations(generation)
            self._cut()
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s: cannot be read (%r); starting anew", self.folder, error)
            return []
        return finished

    def _open(self) -> int:
        """Descriptor of the log, which is held open.

        Should another job that was let loose on this search end first and remove the log, this one still has it.
        """
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


def _evaluations(generation: dict[str, Any]) -> Known:
    """What a generation found, by candidate and tokens."""
    known: Known = {}
    parts = zip(*(generation[key] for key in ("rows", "lengths", "precise", "levels")), strict=True)
    for row, lengths, precise, levels in parts:
        minibatch = Minibatch(tuple(row["sequences"]), tuple(lengths), precise)
        found = Evaluation(row["fitness"], tuple(row["fitness_by_sequence"]))
        known[np.array(levels, dtype=np.int16).tobytes(), minibatch] = found
    return known
