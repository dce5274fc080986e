"""A checkout in a folder of its own, run for real or asked in process which jobs it would run."""

import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from snakemake.api import SnakemakeApi
from snakemake.logging import logger
from snakemake.settings.enums import Quietness, RerunTrigger
from snakemake.settings.types import ConfigSettings, DAGSettings, OutputSettings, ResourceSettings

REPOSITORY = Path(__file__).resolve().parents[2]
PARTS = ("evopress", "scripts", "workflow", "config")


@dataclass(frozen=True)
class Checkout:
    """A copy of the project, with nothing in `results/` at first."""

    root: Path

    @classmethod
    def make(cls, root: Path) -> "Checkout":
        for part in PARTS:
            shutil.copytree(REPOSITORY / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
        return cls(root)

    def run(
        self, settings: Mapping[str, Any], *arguments: str, cores: int = 2, patience: float = 600.0
    ) -> subprocess.CompletedProcess[str]:
        """The command that a user types, with the code of this checkout."""
        overlay = self.root / "settings.yaml"
        overlay.write_text(yaml.safe_dump(dict(settings)))
        command = [sys.executable, "-m", "snakemake", *arguments, "--cores", str(cores), "--configfile", overlay.name]
        environment = os.environ | {"PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=patience)

    def plan(self, settings: Mapping[str, Any], cores: int = 2, targets: Sequence[str] = ()) -> set[str]:
        """Jobs that would run: rule names, with the wildcards that tell jobs of a rule apart (but not blocks)."""
        return {job.label for job in self.jobs(settings, cores, targets)}

    def jobs(self, settings: Mapping[str, Any], cores: int = 2, targets: Sequence[str] = ()) -> list["Job"]:
        """Jobs that would run, in an order in which they can."""
        jobs: list[Job] = []
        profile = yaml.safe_load((self.root / "workflow/profiles/default/config.yaml").read_text())
        assert profile["max-checksum-file-size"] == "64MB"
        with chdir(self.root), SnakemakeApi(OutputSettings(dryrun=True, quiet={Quietness.ALL})) as api:
            logger.addHandler(_Collector(jobs))
            workflow = api.workflow(
                resource_settings=ResourceSettings(cores=cores),
                config_settings=ConfigSettings(config=dict(settings)),
                snakefile=Path("workflow/Snakefile"),
            )
            triggers = frozenset(map(RerunTrigger.parse_choice, profile["rerun-triggers"]))
            dag = workflow.dag(
                DAGSettings(targets=set(targets), max_checksum_file_size=64_000_000, rerun_triggers=triggers)
            )
            dag.execute_workflow(executor="dryrun")
        return [job for job in jobs if job.rule not in ("all", "archives")]


@dataclass(frozen=True)
class Job:
    """What Snakemake says of a job."""

    rule: str
    wildcards: dict[str, str]
    command: list[str]
    """Script and arguments, as the shell takes them apart."""
    inputs: list[str]
    outputs: list[str]
    threads: int

    @property
    def label(self) -> str:
        """The rule, with the wildcards that tell its jobs apart (but not blocks)."""
        return " ".join([self.rule, *(value for key, value in self.wildcards.items() if key not in ("block", "shard"))])

    @property
    def name(self) -> str:
        """The rule and all its wildcards."""
        return " ".join([self.rule, *self.wildcards.values()])


class _Collector(logging.Handler):
    def __init__(self, jobs: list[Job]) -> None:
        super().__init__()
        self.jobs = jobs

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, "rule_name"):
            command = shlex.split(record.shellcmd or "")[1:]
            files = [str(file) for file in record.input], [str(file) for file in record.output]
            self.jobs.append(Job(record.rule_name, dict(record.wildcards), command, *files, record.threads))
