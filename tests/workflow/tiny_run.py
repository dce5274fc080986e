"""A whole tiny run for the tests of faults, made by the scripts themselves, and what to compare of it."""

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from planning import Checkout, Job
from zygote import Ended, Zygote

TARGETS = ("all", "archives")


def fault_settings(tiny: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run with a job of every kind: shards of Hessians, a chain of variants, an embedding, a polish."""
    settings = deepcopy(tiny)
    gptq = settings["variants"]["gptq"]
    settings["hessians"]["shards"] = 2
    settings["variants"]["chain"] = {**gptq, "propagation": "sequential", "propagation_level": "3"}
    gptq["embedding"] = True
    settings["searches"]["evo"]["generations"] = 6
    settings["searches"]["even"] = {"strategy": "uniform", "variants": "chain", "target": 3.0, "polish": "asymmetric"}
    return settings


@dataclass(frozen=True)
class Run:
    """A checkout, the jobs of a whole run in it, and how to run them."""

    checkout: Checkout
    jobs: list[Job]
    zygote: Zygote
    undisturbed: dict[str, Ended] = field(default_factory=dict)
    """How long each job takes, and how often it changes a file."""

    @property
    def results(self) -> Path:
        """Folder of the run."""
        return self.checkout.root / "results" / "tiny"

    def start(self, job: Job, **options: Any) -> Ended:
        """Run a job as Snakemake does: folders made and old outputs removed before."""
        self.make_way(job)
        return self.again(job, **options)

    def again(self, job: Job, **options: Any) -> Ended:
        """Run a job with whatever is there."""
        return self.zygote.run(job.command, self.checkout.root, **options)

    def make_way(self, job: Job) -> None:
        """What Snakemake does before a job."""
        for output in job.outputs:
            path = self.checkout.root / output
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)

    def copy(self, root: Path) -> "Run":
        """The same with a copy of the results that may be spoiled; code is shared."""
        root.mkdir(parents=True)
        for path in self.checkout.root.iterdir():
            if path.name != "results":
                (root / path.name).symlink_to(path)
        shutil.copytree(self.checkout.root / "results", root / "results", symlinks=True)
        return Run(Checkout(root), self.jobs, self.zygote, self.undisturbed)

    def job(self, name: str) -> Job:
        """The job of this rule and wildcards."""
        return next(job for job in self.jobs if job.name == name)

    def contents(self) -> dict[str, Any]:
        """Every artifact by its path: bytes, or what must be equal where bytes cannot."""
        return {path: comparable(self.results / path) for path in self.files()}

    def files(self) -> list[str]:
        """Paths of artifacts: not logs, nor what a killed search resumes from, nor temporary files."""
        paths = (path.relative_to(self.results) for path in sorted(self.results.rglob("*")) if not path.is_dir())
        return [path.as_posix() for path in paths if not is_private(path)]

    def identities(self, without: Iterable[str] = ()) -> dict[str, tuple[int, int]]:
        """What changes when an artifact is made again, though its bytes stay the same."""
        left = set(self.files()) - set(without)
        return {path: (facts := (self.results / path).lstat()) and (facts.st_ino, facts.st_mtime_ns) for path in left}

    def leftovers(self) -> list[str]:
        """Temporary files."""
        return [str(path) for path in self.results.rglob(".*") if not is_snakemake_timestamp(path)]


def is_private(path: Path) -> bool:
    return path.parts[0] == "logs" or "resume" in path.parts or any(part.startswith(".") for part in path.parts)


def is_snakemake_timestamp(path: Path) -> bool:
    return path.name == ".snakemake_timestamp"


VARYING = {"date", "total_evaluation_time_seconds", "start_time", "end_time", "configs"}


def comparable(path: Path) -> Any:
    """Bytes of an artifact, or its content without what tells the time.

    lm-eval writes into its JSON when and how long it ran, and a temporary folder; `effort.parquet` and
    `progress.parquet` say how many seconds a search or a polish took, and the report shows that and what jobs took.
    Everything else is the same to the last byte.
    """
    if path.name == "report.html":
        page = re.sub(rb"polished \((\w+), \d+ s\)", rb"polished (\1)", path.read_bytes())
        return re.sub(rb'<(section|figure) class="timed">.*?</\1>', b"", page, flags=re.DOTALL)
    if path.name == "tasks.json":
        return {key: value for key, value in json.loads(path.read_text()).items() if key not in VARYING}
    if path.name in ("effort.parquet", "progress.parquet"):
        return pq.read_table(path).drop_columns(["seconds"]).to_pylist()
    return path.read_bytes()


def make_run(checkout: Checkout, settings: dict[str, Any], zygote: Zygote, targets: Sequence[str] = ("all",)) -> Run:
    """Run every job once, undisturbed."""
    run = Run(checkout, checkout.jobs(settings, targets=targets), zygote)
    for job in run.jobs:
        ended = run.start(job)
        assert ended.code == 0, f"{job.name}: {ended.output}"
        run.undisturbed[job.name] = ended
    return run
