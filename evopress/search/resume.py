"""The resume folder: what a killed search needs to go on as if it had not been killed.

One small file per generation for the trace, and one with the state, written after it; each write is atomic, so
whatever moment the process dies, the state on disk is that of a finished generation.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np

from evopress.artifacts.atomic import write_text
from evopress.progress import log
from evopress.search.evolution import State
from evopress.search.minibatch import Minibatch
from evopress.search.selection import Judgement
from evopress.search.trace import TraceRow


class ResumeFolder:
    """State and trace of an unfinished search."""

    def __init__(self, folder: Path, digest: str) -> None:
        """Use ``folder`` for the search that ``digest`` identifies (settings and everything that was read)."""
        self.folder, self.digest = folder, digest

    def save(self, state: State, rng: np.random.Generator, rows: list[TraceRow]) -> None:
        """Record a finished generation and the ``rows`` that it added to the trace.

        Raises:
            ArtifactError: the folder cannot be written.
        """
        lines = "".join(json.dumps(row.record()) + "\n" for row in rows)
        write_text(self._trace(state.generation), lines)
        content = {
            "digest": self.digest,
            "generation": state.generation,
            "parent": state.parent.tolist(),
            "known": [[asdict(minibatch), asdict(found)] for minibatch, found in state.known.items()],
            "rng": rng.bit_generator.state,
        }
        write_text(self.folder / "state.json", json.dumps(content))

    def load(self, rng: np.random.Generator) -> State | None:
        """State of the last finished generation, with ``rng`` set to go on from there.

        Returns:
            None if there is nothing to go on from; the log says so if what is there belongs to another search.
        """
        try:
            content = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
            if content["digest"] != self.digest:
                log.info("%s: made by other settings or variants; starting anew", self.folder)
                return None
            state = _decode(content)
            self.records(state.generation)
            rng.bit_generator.state = content["rng"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s: cannot be read (%r); starting anew", self.folder, error)
            return None
        return state

    def records(self, generation: int) -> list[dict]:
        """Trace up to ``generation``, as records of the TRACE schema."""
        lines = (
            line
            for number in range(generation + 1)
            for line in self._trace(number).read_text(encoding="utf-8").splitlines()
        )
        return [json.loads(line) for line in lines]

    def remove(self) -> None:
        """Forget the search; its artifacts are written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _trace(self, generation: int) -> Path:
        return self.folder / f"trace_{generation:06d}.jsonl"


def _decode(content: dict) -> State:
    known = {
        Minibatch(tuple(batch["sequences"]), tuple(batch["lengths"])): Judgement(
            found["fitness"], tuple(found["by_sequence"])
        )
        for batch, found in content["known"]
    }
    return State(content["generation"], np.array(content["parent"], dtype=np.int16), known)
