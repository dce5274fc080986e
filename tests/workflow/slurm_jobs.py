"""What a cluster did with its jobs, as SLURM tells it."""

import re
import subprocess
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

PATIENCE = 600.0
"""Seconds that anything may take."""


@dataclass(frozen=True)
class Job:
    """A job as SLURM saw it."""

    number: str
    what: str
    state: str
    minutes: int
    gpus: int
    restarts: int
    start: datetime
    end: datetime


@dataclass(frozen=True)
class Cluster:
    """The running cluster."""

    folder: Path

    def jobs(self, run: str | None = None) -> list[Job]:
        """Jobs of a run of Snakemake that has ended, by number; without a name, of all."""
        ended: list[Job] = []
        while not ended or any(job.state == "COMPLETING" for job in ended):
            command = ["scontrol", "--oneliner", "show", "jobs"]
            listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE)
            found = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in listed.stdout.splitlines()]
            ended = [_job(facts) for facts in found if run in (None, facts.get("JobName"))]
        return ended

    def requeue(self, run: str) -> None:
        """Take back the running jobs of a run of Snakemake, as for jobs that come first, to start them again later."""
        listed = ["squeue", "--noheader", "--states=running", f"--name={run}", "--format=%i"]
        numbers = subprocess.run(listed, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout.split()
        assert numbers, "no job of it runs"
        subprocess.run(["scontrol", "requeue", ",".join(numbers)], check=True, timeout=PATIENCE)

    def devices(self) -> dict[str, set[str]]:
        """What CUDA_VISIBLE_DEVICES was in each job."""
        devices: dict[str, set[str]] = {}
        for line in (self.folder / "devices").read_text().splitlines():
            number, _, visible = line.partition(" ")
            devices.setdefault(number, set()).add(visible)
        return devices


def _job(facts: dict[str, str]) -> Job:
    hours, minutes, _ = facts["TimeLimit"].split(":")
    gpus = re.search(r"gpu:(\d+)", facts.get("TresPerJob", ""))
    start, end = (_time(facts[each]) for each in ("StartTime", "EndTime"))
    return Job(
        facts["JobId"],
        facts["Comment"],
        facts["JobState"],
        int(hours) * 60 + int(minutes),
        int(gpus[1]) if gpus else 0,
        int(facts["Restarts"]),
        start,
        end,
    )


def _time(text: str) -> datetime:
    return datetime.max if text == "Unknown" else datetime.fromisoformat(text)
