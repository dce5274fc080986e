"""Where time and memory of a run went, stage by stage, beside what the plan foresaw."""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from evopress.artifacts.paths import DENSE, Run
from evopress.artifacts.tables import settings_of
from evopress.export.exporters import EXPORTERS
from evopress.plan.stages import Stage
from evopress.search.strategies import STRATEGIES
from evopress.util.job_logs import Cost, read_cost
from evopress.util.text import amount

HEAD = ["stage", "jobs", "time, s", "longest job, s", "memory, GB", "planned, GB", "planned operations"]
_STAGES = (
    (r"model", "model"),
    (r"tokens/.+", "tokens"),
    (r"hessians/shard_\d+", "hessians"),
    (r"hessians/.+", "hessian sums"),
    (r"variants/(.+)/(?:block_\d+|modules)", "variants {}"),
    (r"variants/(.+)/block_embedding", "variants {}, embedding"),
    (r"effects/(.+)", "effects {}"),
    (r"search/(.+)", "search {}"),
    (r"polish/(.+)", "polish {}"),
    (r"export/.+", "export"),
    (r"evaluation/.+/perplexity", "perplexity"),
    (r"evaluation/.+/tasks", "tasks"),
    (r"evaluation/.+/runtime", "runtime"),
    (r"card/.+", "report"),
)
"""Logs of jobs, as paths below `logs/`, and the stage of the plan that they belong to."""


@dataclass(frozen=True)
class StageCost:
    """What the jobs of one stage took."""

    name: str
    jobs: list[Cost]

    def row(self, planned: Stage | None) -> list[str]:
        """Texts for HEAD."""
        seconds = [job.seconds for job in self.jobs]
        memory = max(job.memory_gb + job.device_gb for job in self.jobs)
        foreseen = ["-", "-"]
        if planned is not None:
            foreseen = [f"{planned.memory / 1e9:.2f}", amount(planned.flops) if planned.flops else "-"]
        return [
            self.name,
            str(len(seconds)),
            f"{sum(seconds):,.1f}",
            f"{max(seconds):,.1f}",
            f"{memory:.2f}",
            *foreseen,
        ]


def cost_rows(run: Run, searches: Collection[str], planned: Sequence[Stage] = ()) -> list[list[str]]:
    """A table as text, HEAD first; empty if no log tells what a job took.

    Args:
        run: the run.
        searches: that count, with what they are made of; logs of others, which an earlier run has left, do not.
        planned: stages of the plan, whose names those of the logs are.
    """
    by_stage: dict[str, list[Cost]] = {}
    for stage, cost in _costs(run, searches):
        by_stage.setdefault(stage, []).append(cost)
    if not by_stage:
        return []
    known, order = {stage.name: stage for stage in planned}, [_first(pattern) for _, pattern in _STAGES]
    costs = sorted(by_stage.items(), key=lambda item: order.index(_first(item[0])))
    return [HEAD, *(StageCost(name, jobs).row(known.get(name)) for name, jobs in costs)]


def _costs(run: Run, searches: Collection[str]) -> Iterator[tuple[str, Cost]]:
    logs, in_use = run.root / "logs", _in_use(run, searches)
    for path in sorted(logs.rglob("*.log")):
        folder, *inside = path.relative_to(logs).with_suffix("").parts
        if folder in in_use and inside[0] not in in_use[folder]:
            continue
        stage = _stage_of(path.relative_to(logs))
        if stage and (cost := read_cost(path)) is not None:
            yield stage, cost


def _in_use(run: Run, searches: Collection[str]) -> dict[str, set[str]]:
    """Names in folders of `logs/` that belong to searches; in other folders, all count."""
    strategies = [STRATEGIES.parse(settings_of(run.configuration(search)), "settings") for search in searches]
    effects = [strategy.effects() for strategy in strategies]
    exports = {f"{search}_{EXPORTERS.name_of(one)}" for search in searches for one in EXPORTERS.plugins}
    return {
        "variants": {source for strategy in strategies for source in strategy.sources},
        "effects": {one.name for one in effects if one is not None},
        "search": set(searches),
        "polish": set(searches),
        "export": exports,
        "evaluation": {DENSE, *searches},
        "card": exports,
    }


def _stage_of(log: Path) -> str | None:
    """Stage of a job, by the place of its log; None for those of the report and of studies."""
    name = log.with_suffix("").as_posix()
    for pattern, stage in _STAGES:
        if match := re.fullmatch(pattern, name):
            return stage.format(*match.groups())
    return None


def _first(stage: str) -> str:
    """The kind of a stage, without a name that the settings give."""
    return re.sub(r"(variants|effects|search|polish) .*?(, embedding)?$", r"\1\2", stage)
