"""A checkout in a folder of its own, run for real or asked in process which jobs it would run."""

import logging
import os
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
from snakemake.settings.enums import Quietness
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

    def run(self, settings: Mapping[str, Any], *arguments: str, cores: int = 2) -> subprocess.CompletedProcess[str]:
        """The command that a user types, with the code of this checkout."""
        overlay = self.root / "settings.yaml"
        overlay.write_text(yaml.safe_dump(dict(settings)))
        command = [sys.executable, "-m", "snakemake", *arguments, "--cores", str(cores), "--configfile", overlay.name]
        environment = os.environ | {"PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=600)

    def plan(self, settings: Mapping[str, Any], cores: int = 2, targets: Sequence[str] = ()) -> set[str]:
        """Jobs that would run: rule names, with the wildcards that tell jobs of a rule apart (but not blocks)."""
        jobs: set[str] = set()
        profile = yaml.safe_load((self.root / "workflow/profiles/default/config.yaml").read_text())
        assert profile["max-checksum-file-size"] == "64MB"
        with chdir(self.root), SnakemakeApi(OutputSettings(dryrun=True, quiet={Quietness.ALL})) as api:
            logger.addHandler(_Collector(jobs))
            workflow = api.workflow(
                resource_settings=ResourceSettings(cores=cores),
                config_settings=ConfigSettings(config=dict(settings)),
                snakefile=Path("workflow/Snakefile"),
            )
            dag = workflow.dag(DAGSettings(targets=set(targets), max_checksum_file_size=64_000_000))
            dag.execute_workflow(executor="dryrun")
        return jobs - {"all", "archives"}


class _Collector(logging.Handler):
    def __init__(self, jobs: set[str]) -> None:
        super().__init__()
        self.jobs = jobs

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, "rule_name"):
            wildcards = [value for key, value in record.wildcards.items() if key not in ("block", "shard")]
            self.jobs.add(" ".join([record.rule_name, *wildcards]))
