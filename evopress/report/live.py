"""The state of a run, and of its unfinished searches, as a frame of text; read only, while jobs write."""

import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from evopress.artifacts.paths import EMBEDDING, Run, block_name
from evopress.config.base import parse_json
from evopress.search.strategies import STRATEGIES
from evopress.util.errors import EvopressError
from evopress.util.job_logs import JobLog, read_logs
from evopress.workflow.searches import with_file

_RATE_ROUNDS = 5
"""Rounds that the rate is the mean of."""
MOVES = 5
"""Accepted moves that are shown, at most."""
_CHANGES = 3
"""Units of a move that are named, at most."""
_SPLIT = ("variants", "effects", "search", "polish", "evaluation")
"""Stages with a row for each name below them."""
_COLOURS = {"running": "green", "failed": "red", "interrupted": "yellow", "silent": "yellow", "waiting": "yellow"}


@dataclass(frozen=True)
class Move:
    """What a round changed in the best candidate."""

    round: int
    changes: tuple[str, ...]
    """Units with their levels before and after."""
    fitness: float


@dataclass(frozen=True)
class LiveSearch:
    """State of an unfinished search."""

    name: str
    round: int
    """Rounds that are finished."""
    fitness: float
    """Of the best so far, on the tokens of the last selection that it won; NaN where none was made."""
    tokens_per_second: float
    """Of the last few rounds."""
    moves: tuple[Move, ...]
    """Those that were accepted, the latest first."""


@dataclass(frozen=True)
class UnitNames:
    """Names of what has levels, and of its levels."""

    units: Sequence[tuple[str, Sequence[str]]] = ()

    def change(self, unit: int, before: int, after: int) -> str:
        """A unit that went from one level to another, by its number where names are not known."""
        if unit >= len(self.units):
            return f"unit {unit}: level {before} to {after}"
        name, levels = self.units[unit]
        return f"{name.removeprefix('model.')}: {levels[before]} to {levels[after]}"


def read_search(run: Run, name: str, names: UnitNames) -> LiveSearch | None:
    """An unfinished search; None where nothing of it is there yet, or any longer."""
    rounds = list(finished_rounds(run, name))
    if not rounds:
        return None
    last = rounds[-_RATE_ROUNDS:]
    seconds = sum(each["seconds"] for each in last)
    rate = sum(each["tokens"] for each in last) / seconds if seconds > 0 else float("nan")
    moves = tuple(_moves(rounds, names))[::-1]
    return LiveSearch(name, rounds[-1]["generation"], _fitness(rounds[-1]), rate, moves)


def finished_rounds(run: Run, name: str) -> Iterator[dict[str, Any]]:
    """Finished rounds; a line that is being written, or is damaged, is left out."""
    with suppress(OSError), (run.resume(name) / "log.jsonl").open(encoding="utf-8", errors="replace") as stream:
        next(stream, "")  # says which search it is
        for line in stream:
            with suppress(ValueError, KeyError, TypeError, IndexError):
                finished = json.loads(line.partition(" ")[2])
                finished["population"][0], finished["generation"], finished["rows"], float(finished["seconds"])
                yield finished


def _moves(rounds: Sequence[dict[str, Any]], names: UnitNames) -> Iterator[Move]:
    for before, after in pairwise(rounds):
        old, new = before["population"][0], after["population"][0]
        changes = tuple(
            names.change(unit, one, other)
            for unit, (one, other) in enumerate(zip(old, new, strict=False))
            if one != other
        )
        if changes:
            yield Move(after["generation"], changes, _fitness(after))


def _fitness(finished: dict[str, Any]) -> float:
    """Best of what a round accepted."""
    accepted = [row["fitness"] for row in finished["rows"] if row.get("accepted") and row.get("fitness") is not None]
    return min(accepted, default=float("nan"))


def unit_names(run: Run, job: JobLog) -> UnitNames:
    """Names of the units of a search, from the settings in its log and the variants; none where these are gone."""
    from evopress.search.run import open_problem  # only here: reading logs alone must not take seconds

    options = dict(zip(job.command, job.command[1:], strict=False))
    with suppress(EvopressError, OSError, ValueError, KeyError):
        where = f"searches.{options['--name']}"
        strategy = with_file(parse_json(STRATEGIES, options["--strategy"], where), where)
        units = open_problem(run, strategy, where).space.units
        return UnitNames([(unit.name, [level.label for level in unit.levels]) for unit in units])
    return UnitNames()


class Watcher:
    """Looks at a run again and again; keeps what is slow to find out."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._names: dict[tuple[str, ...], UnitNames] = {}

    def frame(self) -> RenderableType:
        """What there is to see now."""
        jobs = read_logs(self.run.root / "logs")
        if not jobs:
            return f"{escape(str(self.run.root))}: nothing has run yet (there are no logs)"
        blocks = count_blocks(self.run)
        rows = [stage_row(self.run, label, list(members), blocks) for label, members in groupby(jobs, label_of)]
        searches = [search for job in jobs if (search := self._search(job)) is not None]
        failures = [f"[red]{escape(job.name)}: {escape(job.message)}[/]" for job in jobs if job.state == "failed"]
        title = f"{escape(str(self.run.root))}, {time.strftime('%H:%M:%S')}"
        return Group(title, table_of(rows), *map(search_text, searches), *failures)

    def _search(self, job: JobLog) -> LiveSearch | None:
        if job.stage != "search" or job.state == "finished":
            return None
        if job.command not in self._names:
            self._names[job.command] = unit_names(self.run, job)
        return read_search(self.run, job.name.removeprefix("search/"), self._names[job.command])


def label_of(job: JobLog) -> str:
    """Row of a job: its stage, and what tells parts of some stages apart."""
    parts = job.name.split("/")
    return " ".join(parts[:2]) if parts[0] in _SPLIT else parts[0]


def count_blocks(run: Run) -> int:
    """Blocks of the model; 0 as long as they are not known."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads(run.model_manifest.read_text(encoding="utf-8"))["blocks"])
    return 0


def stage_row(run: Run, label: str, jobs: Sequence[JobLog], blocks: int) -> tuple[str, ...]:
    """Stage, jobs (or blocks) that are done, state, where it runs, progress and time left."""
    busy = [job for job in jobs if job.state != "finished"]
    done, total = len(jobs) - len(busy), len(jobs)
    if label == "hessians":  # one job makes all of them, and that of the head's input
        total = blocks + 1
        done = count(run.hessian("*")) if busy else total
    elif label.startswith("variants ") and any("/block_" in job.name for job in jobs):
        done = count(run.variant_table(label.removeprefix("variants "), "*"))
        total = blocks + any(job.name.endswith(f"/{block_name(EMBEDDING)}") for job in jobs)
    finished = f"{done}/{max(done, total)}"
    if not busy:
        return label, finished, "finished" if done >= total else "[yellow]waiting[/]", "", "", ""
    shown = max(busy, key=lambda job: (job.state == "running", bool(job.total)))
    places = ", ".join(dict.fromkeys(place_of(job) for job in busy if job.state == "running"))
    progress = f"{shown.what}: {shown.done}/{shown.total} {shown.unit}" if shown.total else ""
    return label, finished, states_of(busy), escape(places), escape(progress), duration(shown.left)


def count(pattern: Path) -> int:
    """Files that are in place."""
    return len(list(pattern.parent.glob(pattern.name)))


def states_of(jobs: Sequence[JobLog]) -> str:
    """How many jobs are in each state, in colours."""
    counts = Counter(job.state for job in jobs)
    return ", ".join(
        f"[{_COLOURS[state]}]{f'{number} ' if number > 1 else ''}{state}[/]" for state, number in counts.items()
    )


def place_of(job: JobLog) -> str:
    """Machine, and device if it leased one."""
    return f"{job.host} {job.device}".strip()


def duration(seconds: float) -> str:
    """Time in words; empty where it is not known."""
    if not math.isfinite(seconds):
        return ""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def table_of(rows: Sequence[tuple[str, ...]]) -> Table:
    """The stages."""
    table = Table(box=None, pad_edge=False)
    for name in ("stage", "done", "state", "where", "progress", "left"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def search_text(search: LiveSearch) -> str:
    """An unfinished search and the moves that it accepted last."""
    lines = [
        "",
        f"[bold]search {escape(search.name)}[/]: {search.round} rounds, fitness of the best {search.fitness:.4g}, "
        f"{search.tokens_per_second:.3g} tokens/s, {len(search.moves)} moves accepted",
    ]
    for move in search.moves[:MOVES]:
        changes = ", ".join(move.changes[:_CHANGES])
        more = f" and {len(move.changes) - _CHANGES} more" if len(move.changes) > _CHANGES else ""
        lines.append(escape(f"  round {move.round}: {changes}{more}; fitness {move.fitness:.4g}"))
    return "\n".join(lines)
