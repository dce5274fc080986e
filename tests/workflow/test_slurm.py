"""The workflow through a real SLURM of one node with two fake GPUs, by the profile that users have.

Jobs ask for GPUs and, as there are none in truth, compute on the CPU (`compute.device: auto`). Waiting for a time limit
of a minute is what takes long, so the other tests run meanwhile.
"""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import impatient
import one_node
import pytest
import yaml
from planning import REPOSITORY, Checkout
from slurm_jobs import PATIENCE, Cluster, Job

from evopress.artifacts.paths import Run

PLUGIN = "" if importlib.util.find_spec("snakemake_executor_plugin_slurm") else "evopress[slurm] is not installed"
REASON = PLUGIN or one_node.why_not()
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(REASON), reason=REASON)]

PROFILES = REPOSITORY / "workflow/profiles/slurm"
# Laid over the search of a checkout: the first time, it stops after a generation until SLURM ends it.
PAUSE = '''

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_plain = stop_on_sigterm


@contextmanager
def stop_on_sigterm() -> Iterator[Callable[[], None]]:
    """The same, with a rest."""
    import time
    from pathlib import Path

    log, rested = Path("results/tiny/search/evo/resume/log.jsonl"), Path("rested")
    with _plain() as check:

        def rest() -> None:
            check()
            if log.exists() and len(log.read_text().splitlines()) > 2 and not rested.exists():
                rested.touch()
                while True:
                    time.sleep(0.1)
                    check()

        yield rest
'''


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster that ends with this module, or with this process."""
    folder = tmp_path_factory.mktemp("slurm") / "cluster"
    command = [sys.executable, one_node.__file__, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield Cluster(folder)
        process.stdin.close()
        assert process.wait(timeout=PATIENCE) == 0
    assert one_node.why_not() == ""


@pytest.mark.parametrize("killed", ["starter", "cluster"])
def test_the_cluster_ends_whatever_ends_the_tests(killed: str, tmp_path: Path) -> None:
    ready, pids = tmp_path / "ready", [tmp_path / "cluster" / f"{daemon}.pid" for daemon in one_node.DAEMONS]
    code = (
        "import subprocess, sys; cluster = subprocess.Popen([sys.executable, *sys.argv[1:3]], stdin=subprocess.PIPE,"
        " stdout=open(sys.argv[3], 'wb'), start_new_session=True); print(cluster.pid, flush=True); cluster.wait()"
    )
    command = [sys.executable, "-c", code, one_node.__file__, str(tmp_path / "cluster"), str(ready)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        cluster = int(starter.stdout.readline())
        _wait_until(lambda: ready.exists() and ready.read_text() == "ready\n", "the cluster")
        assert "a cluster of its own" in one_node.why_not()
        daemons = [int(pid.read_text()) for pid in pids]
        os.kill(*((starter.pid, signal.SIGKILL) if killed == "starter" else (cluster, signal.SIGINT)))
        _wait_until(lambda: one_node.why_not() == "" and not any(map(_running, daemons)), "the end of the cluster")


@dataclass(frozen=True)
class Submitted:
    """A run of Snakemake on the cluster, in a checkout."""

    checkout: Checkout
    process: subprocess.Popen[str]
    output: Path

    @property
    def name(self) -> str:
        """What SLURM calls its jobs."""
        found = re.search(r"SLURM run ID: (\S+)", self.output.read_text())
        assert found, self.output.read_text()
        return found[1]

    @property
    def results(self) -> Run:
        return Run(self.checkout.root / "results/tiny")

    def end(self) -> int:
        """Wait until it has ended."""
        return self.process.wait(timeout=PATIENCE)


def submit(checkout: Checkout, settings: dict[str, Any], *targets: Path, **site: object) -> Submitted:
    """Start what the README says, with a file of the site's own."""
    example = yaml.safe_load((PROFILES / "example.yaml").read_text())
    example["default-resources"]["slurm_partition"] = one_node.PARTITION
    (checkout.root / "site.yaml").write_text(yaml.safe_dump(example | site))
    (checkout.root / "mine.yaml").write_text(yaml.safe_dump(settings))
    profiles = ["--profile", "workflow/profiles/slurm", "--profile", "site.yaml"]
    names = [str(target.relative_to(checkout.root)) for target in targets]
    command = [sys.executable, impatient.__file__, *names, *profiles, "--configfile", "mine.yaml"]
    environment = os.environ | {"PYTHONPATH": str(checkout.root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    output = checkout.root / "output.txt"
    with output.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=checkout.root, env=environment, stdout=stream, stderr=subprocess.STDOUT, text=True
        )
    return Submitted(checkout, process, output)


def restless(checkout: Checkout) -> Checkout:
    """The checkout, with a search that stops in its middle the first time."""
    module = checkout.root / "evopress/search/rounds.py"  # of searches alone: nothing before them runs again
    module.write_text(module.read_text() + PAUSE)
    return checkout


@pytest.fixture(scope="module")
def whole(cluster: Cluster, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Submitted]:
    """Everything from nothing, on its way, with one minute for the search at first."""
    checkout = restless(Checkout.make(tmp_path_factory.mktemp("slurm") / "evopress"))
    resources = yaml.safe_load((PROFILES / "config.yaml").read_text())["set-resources"]
    resources["search"] = resources["search"] | {"runtime": "1 * attempt"}
    run = submit(checkout, settings, **{"set-resources": resources, "groups": None})
    yield run
    run.process.kill()
    run.process.wait()


@pytest.fixture
def copied(finished: Checkout, tmp_path: Path) -> Checkout:
    """A copy of the run that the workstation finished."""
    return Checkout(Path(shutil.copytree(finished.root, tmp_path / "evopress")))


def test_a_job_that_always_fails_ends_the_run_with_the_reason_and_the_log(
    whole: Submitted, cluster: Cluster, copied: Checkout, settings: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "short.jsonl").write_text('{"text": "abc"}\n')  # of a .txt, the dry run would tell
    text = settings["data"]["evaluation"]["held"] | {"path": str(tmp_path / "short.jsonl")}
    too_little = settings | {"data": settings["data"] | {"evaluation": {"held": text}}}
    results = Run(copied.root / "results/tiny")
    run = submit(copied, too_little, results.tokens("held"), retries=1)
    assert run.end() == 1
    said, log = run.output.read_text(), "results/tiny/logs/tokens/held.log"
    assert log in said and "short.jsonl" in said
    attempts = cluster.jobs(run.name)
    assert [job.state for job in attempts] == ["FAILED", "FAILED"]
    assert attempts[1].minutes == 2 * attempts[0].minutes


@pytest.mark.parametrize("killed", [False, True])
def test_an_ended_run_leaves_no_jobs_once_these_are_cancelled_and_goes_on_when_started_again(
    killed: bool, whole: Submitted, cluster: Cluster, copied: Checkout, finished: Checkout, settings: dict[str, Any]
) -> None:
    results = Run(copied.root / "results/tiny")
    run = submit(restless(copied), settings, results.configuration("evo"))
    _wait_until((copied.root / "rested").exists, "the search")
    run.process.send_signal(signal.SIGKILL if killed else signal.SIGINT)
    assert run.end() != 0
    if killed:  # nobody has cancelled them
        assert [job.state for job in cluster.jobs(run.name)] == ["RUNNING"]
        subprocess.run(["scancel", "--name", run.name], check=True)
        assert copied.run(settings, "--unlock").returncode == 0
    assert [job.state for job in cluster.jobs(run.name)] == ["CANCELLED"]
    assert results.resume("evo").exists()

    again = submit(copied, settings, results.configuration("evo"))
    assert again.end() == 0, again.output.read_text()
    assert _search(results) == _search(Run(finished.root / "results/tiny"))


def test_a_job_that_slurm_takes_back_and_starts_again_goes_on_by_itself(
    whole: Submitted, cluster: Cluster, copied: Checkout, finished: Checkout, settings: dict[str, Any]
) -> None:
    results = Run(copied.root / "results/tiny")
    run = submit(restless(copied), settings, results.configuration("evo"), retries=0)
    _wait_until((copied.root / "rested").exists, "the search")
    cluster.requeue(run.name)
    assert run.end() == 0, run.output.read_text()
    (search,) = cluster.jobs(run.name)
    assert (search.state, search.restarts) == ("COMPLETED", 1)
    assert "goes on after" in (copied.root / "results/tiny/logs/search/evo.log").read_text()
    assert _search(results) == _search(Run(finished.root / "results/tiny"))


def test_blocks_share_a_job_and_one_gpu_and_a_search_has_one_for_each_process(
    whole: Submitted, cluster: Cluster, copied: Checkout, settings: dict[str, Any]
) -> None:
    second = settings["variants"]["gptq"] | {"group_size": 8}
    pair = settings["searches"]["evo"] | {"variants": "second"}
    more = settings | {"variants": settings["variants"] | {"second": second}}
    more |= {"searches": settings["searches"] | {"pair": pair}, "compute": {"processes": 2}}
    run = submit(copied, more, Run(copied.root / "results/tiny").configuration("pair"))
    assert run.end() == 0, run.output.read_text()
    blocks, search = cluster.jobs(run.name)
    assert (blocks.gpus, blocks.minutes) == (1, 3 * 60)
    assert search.gpus == 2
    assert cluster.devices()[search.number] == {"0,1"}


def test_the_whole_workflow_as_on_a_workstation_and_past_a_time_limit(
    whole: Submitted,
    cluster: Cluster,
    finished: Checkout,
    settings: dict[str, Any],
    record_property: Callable[[str, object], None],
) -> None:
    assert whole.end() == 0, whole.output.read_text()
    here = Run(finished.root / "results/tiny")
    assert _search(whole.results) == _search(here)
    assert whole.results.summary.read_text() == here.summary.read_text()

    jobs = cluster.jobs(whole.name)
    searches = [(job.state, job.minutes) for job in jobs if job.what.startswith("rule_search")]
    assert searches == [("TIMEOUT", 1), ("COMPLETED", 2)]
    assert "TIMEOUT" in whole.output.read_text()
    log = (whole.checkout.root / "results/tiny/logs/search/evo.log").read_text()
    assert "goes on after" in log

    once = [job for job in cluster.jobs() if job.gpus and not job.restarts]  # of others, the last start alone is known
    _check_devices(once, cluster.devices())
    seconds = (max(job.end for job in jobs) - min(job.start for job in jobs)).seconds
    record_property("fact", f"{len(jobs)} SLURM jobs in {seconds} s, with {len(cluster.jobs())} of all tests")

    again = submit(whole.checkout, settings)
    assert again.end() == 0
    assert "Nothing to be done" in again.output.read_text()


def _check_devices(jobs: list[Job], devices: dict[str, set[str]]) -> None:
    """Each has its own devices while it runs, and different jobs do run at a time."""
    given = {job.number: [number for visible in devices[job.number] for number in visible.split(",")] for job in jobs}
    assert all(len(given[job.number]) == job.gpus for job in jobs)
    most = 0
    for job in jobs:
        together = [other for other in jobs if other.start <= job.start < other.end]
        numbers = sorted(number for other in together for number in given[other.number])
        assert numbers in (["0"], ["1"], ["0", "1"])
        most = max(most, len(together))
    assert most == one_node.GPUS


def _search(results: Run) -> tuple[bytes, bytes]:
    return results.configuration("evo").read_bytes(), results.trace("evo").read_bytes()


def _wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, f"still waiting for {what}"
        time.sleep(0.2)


def _running(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False
