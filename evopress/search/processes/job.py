"""What the processes of one search are told, and what they tell when they fail: small JSON files in a folder."""

import json
from dataclasses import dataclass
from pathlib import Path

from evopress.artifacts.paths import Run
from evopress.config.compute import ComputeSettings
from evopress.search.settings import SearchSettings
from evopress.search.strategies import STRATEGIES
from evopress.util import errors
from evopress.util.errors import EvopressError

LOST_PEER = 75
"""Exit code of a process that ends because another one did."""


@dataclass(frozen=True)
class Job:
    """A search for several processes (`run_search` has the meaning of each part)."""

    run: Run
    name: str
    settings: SearchSettings
    compute: ComputeSettings
    trust_remote_code: bool


@dataclass(frozen=True)
class JobFolder:
    """Temporary folder of a running job."""

    path: Path

    @property
    def meeting(self) -> Path:
        """File through which the processes find each other."""
        return self.path / "meeting"

    def output(self, rank: int) -> Path:
        """What a process other than the first writes to standard error."""
        return self.path / f"rank_{rank}.log"

    def write_job(self, job: Job, log: Path | None) -> None:
        """Say what is to be done; ``log`` is where the first process logs."""
        content = {
            "results": str(job.run.root),
            "name": job.name,
            "settings": job.settings.model_dump(mode="json"),
            "compute": job.compute.model_dump(mode="json"),
            "trust_remote_code": job.trust_remote_code,
            "log": str(log) if log else None,
        }
        (self.path / "job.json").write_text(json.dumps(content), encoding="utf-8")

    def read_job(self) -> tuple[Job, Path | None]:
        """What `write_job` said."""
        content = json.loads((self.path / "job.json").read_text(encoding="utf-8"))
        job = Job(
            Run(Path(content["results"])),
            content["name"],
            STRATEGIES.parse(content["settings"], f"searches.{content['name']}"),
            ComputeSettings.model_validate(content["compute"]),
            content["trust_remote_code"],
        )
        return job, Path(content["log"]) if content["log"] else None

    def write_error(self, rank: int, error: EvopressError) -> None:
        """Leave an error for the process that started this one."""
        text = json.dumps([type(error).__name__, str(error)])
        self._error(rank).write_text(text, encoding="utf-8")

    def read_error(self, rank: int) -> EvopressError | None:
        """The error that a process left, if it did."""
        try:
            kind, message = json.loads(self._error(rank).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return getattr(errors, kind, errors.SearchError)(message)

    def _error(self, rank: int) -> Path:
        return self.path / f"rank_{rank}.error"
