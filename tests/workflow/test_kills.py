"""SIGKILL at random points of every stage and of Snakemake itself: after a restart every artifact is as if nothing had
happened, nothing half-written counts as finished, and nothing finished is made again.
"""

import base64
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from planning import Checkout, Job
from tiny_run import Run, make_run
from zygote import Zygote

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc"),
]
STAGES = [
    "model",
    "tokens calibration",
    "hessians 1",
    "hessian_sum 001",
    "variants gptq 001",
    "variants_embedding gptq",
    "variants_sequential chain 001",
    "search evo",
    "search even",
    "polish even",
    "export evo huggingface",
    "export evo archive",
    "perplexity_dense",
    "perplexity evo",
    "tasks_dense",
    "tasks evo",
    "card evo huggingface",
    "report",
]
CARD_FILES = ("README.md", "levels.png")
"""That the card's job writes beside an export."""
KILLS_PER_STAGE = 3
KILLS_OF_SNAKEMAKE = 5


def exported(job: Job) -> str:
    """Folder of an export, in the folder of the run."""
    return f"exports/{job.wildcards.get('search')}/{job.wildcards.get('exporter')}/"


def made_by(job: Job) -> tuple[str, ...]:
    """Beginnings of the paths of all that a job writes, in the folder of the run."""
    polished = f"search/{job.wildcards.get('search')}/polished/"
    folders = {"model": ["model/"], "export": [exported(job)], "polish": [polished]}
    declared = [output.removeprefix("results/tiny/") for output in job.outputs]
    return (*declared, *folders.get(job.rule, []))


def test_every_rule_is_struck(whole: Run) -> None:
    struck = {whole.job(name).rule for name in STAGES}
    assert struck == {job.rule for job in whole.jobs}


@pytest.mark.parametrize("name", STAGES)
def test_a_killed_job_leaves_nothing_that_looks_done_and_ends_the_same_when_restarted(
    whole: Run, name: str, dice: random.Random, kills: list[str], tmp_path: Path
) -> None:
    run, job = whole.copy(tmp_path / "evopress"), whole.job(name)
    own, expected = made_by(job), whole.contents()
    others = [path for path in expected if not path.startswith(own)]
    before = run.identities(without=set(expected) - set(others))
    for number in range(KILLS_PER_STAGE):
        run.make_way(job)
        point = strike(run, job, by_time=number == 0, dice=dice)
        if point:
            kills.append(f"{name}: {point}")
        check_nothing_looks_done(run, job, expected, point)
    ended = run.start(job)
    assert ended.code == 0, ended.output
    after = run.contents()
    by_card = {f"{exported(job)}{name}" for name in CARD_FILES}
    lost = by_card if job.rule == "export" else set()  # the card's job writes them anew
    assert set(after) | lost == set(expected) | lost
    assert [path for path in after if after[path] != expected[path]] == []
    assert run.identities(without=set(expected) - set(others)) == before, "finished artifacts were made again"
    assert run.leftovers() == []


def strike(run: Run, job: Job, *, by_time: bool, dice: random.Random) -> str:
    """Kill the job: after some part of the time it takes, or just before one of its changes of files."""
    usual = run.undisturbed[job.name]
    if by_time:
        process = run.zygote.start(job.command, run.checkout.root)
        delay = dice.uniform(0, usual.seconds)
        time.sleep(delay)
        os.kill(process, signal.SIGKILL)
        ended = run.zygote.wait(process)
        return f"after {delay:.2f} s" if ended.code == -signal.SIGKILL else ""
    number = dice.randint(1, usual.changes)
    ended = run.again(job, strike=number)
    if ended.code == 0:  # a search that goes on has less left to write
        return ""
    assert ended.code == -signal.SIGKILL, ended.output
    return f"before change {number} of {usual.changes}"


def check_nothing_looks_done(run: Run, job: Job, expected: dict[str, Any], point: str) -> None:
    """What is there is what an undisturbed run makes; if all that Snakemake asks for is there, the rest is, too."""
    found = run.contents()
    assert [path for path in found if found[path] != expected[path]] == [], point
    if all((run.checkout.root / output).exists() for output in job.outputs):
        needed = {path for path in expected if path.startswith(made_by(job)) and not path.endswith(CARD_FILES)}
        assert needed <= set(found), point


@pytest.fixture(scope="module")
def small(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run whose jobs start quickly."""
    return {**settings, "evaluation": {"tasks": {"names": []}}}


def test_snakemake_is_killed_and_run_again(
    small: dict[str, Any], zygote: Zygote, dice: random.Random, kills: list[str], tmp_path: Path
) -> None:
    whole = make_run(Checkout.make(tmp_path / "whole" / "evopress"), small, zygote)
    expected = whole.contents()
    checkout = Checkout.make(tmp_path / "killed" / "evopress")
    run = Run(checkout, [], zygote)
    (checkout.root / "settings.yaml").write_text(yaml.safe_dump(small, sort_keys=False))
    ways = ["all of its processes", "it alone, and its jobs end", "it alone, and its jobs meet those of the next run"]
    finished: dict[str, tuple[int, int]] = {}
    for number in range(KILLS_OF_SNAKEMAKE):
        way = ways[number % len(ways)]
        with running(checkout) as snakemake:
            jobs = wait_for_jobs(snakemake, checkout, dice.randint(0, 4))
            time.sleep(dice.uniform(0, 3))
            if snakemake.poll() == 0:  # it has done all that earlier ones had left
                assert number > 0
                break
            snakemake.kill()
            snakemake.wait()
            if way == ways[0]:
                kill_all(jobs_of(snakemake.pid))
            elif way == ways[1]:
                wait_for(lambda pid=snakemake.pid: not jobs_of(pid))
        kills.append(f"snakemake, {way}, after {jobs} jobs")
        assert snakemake.returncode == -signal.SIGKILL, (checkout.root / "output.txt").read_text()
        found = run.contents()
        assert [path for path in found if found[path] != expected[path]] == [], kills[-1]
        begun = made_by_jobs_not_ended(checkout, whole.jobs)
        now = {path: identity for path, identity in run.identities().items() if not path.startswith(begun)}
        assert {path: now.get(path) for path in finished} == finished, "finished artifacts were made again"
        finished = now
        unlocked = command(checkout, "--unlock")
        assert unlocked.returncode == 0, unlocked.stderr
    outcome = command(checkout, "--cores", "2")
    assert outcome.returncode == 0, outcome.stderr
    assert run.contents() == expected
    now = run.identities()
    assert {path: now[path] for path in finished} == finished, "finished artifacts were made again"
    again = command(checkout, "--cores", "2")
    assert "Nothing to be done" in again.stderr, again.stderr
    check_damage_is_mended(run, expected)


def check_damage_is_mended(run: Run, expected: dict[str, Any]) -> None:
    """A job that fails on a damaged input ends the run; the next one mends it, though the report of before is there."""
    path = run.results / "search" / "evo" / "configuration.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    failed = command(run.checkout, "--cores", "2", "--forcerun", "export")
    assert failed.returncode == 1
    assert "search/evo/configuration.parquet: damaged (differs from its checksum" in failed.stderr
    mended = command(run.checkout, "--cores", "2")
    assert mended.returncode == 0, mended.stderr
    (path.parent / "configuration.parquet.damaged").unlink()
    assert run.contents() == expected


def command(checkout: Checkout, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of the README, to its end."""
    return subprocess.run(**_invocation(checkout, *arguments), capture_output=True, text=True, timeout=600)


def _invocation(checkout: Checkout, *arguments: str) -> dict[str, Any]:
    words = [sys.executable, "-m", "snakemake", *arguments, "--configfile", "settings.yaml"]
    homeless = {"HOME": "/dev/null/none", "XDG_CACHE_HOME": str(checkout.root / ".cache")}  # as the README has it
    environment = os.environ | {"PYTHONPATH": str(checkout.root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= homeless
    return {"args": words, "cwd": checkout.root, "env": environment}


@contextmanager
def running(checkout: Checkout) -> Iterator[subprocess.Popen[bytes]]:
    """Snakemake at work, in a session of its own."""
    with (checkout.root / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            **_invocation(checkout, "--cores", "2"), stdout=output, stderr=output, start_new_session=True
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                kill_all([process.pid, *jobs_of(process.pid)])
                process.wait()


def wait_for_jobs(snakemake: subprocess.Popen[bytes], checkout: Checkout, count: int) -> int:
    """Wait until so many jobs have ended and another has begun, or all have ended; returns how many have."""
    output = checkout.root / "output.txt"

    def enough() -> bool:
        text = output.read_text()
        if (code := snakemake.poll()) is not None:
            assert code == 0, text
            return True
        return text.count("Finished jobid") >= count and bool(jobs_of(snakemake.pid))

    wait_for(enough)
    return output.read_text().count("Finished jobid")


def jobs_of(session: int) -> list[int]:
    """Processes of a session that run, its leader apart."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, *fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[2]) == session and state != "Z" and int(folder.name) != session:
            found.append(int(folder.name))
    return found


def kill_all(processes: list[int]) -> None:
    for process in processes:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait_for(condition: Any, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happens"
        time.sleep(0.02)


def made_by_jobs_not_ended(checkout: Checkout, jobs: list[Job]) -> tuple[str, ...]:
    """Beginnings of the paths of what Snakemake holds for incomplete: of a model, all that lies beside its manifest."""
    marks = checkout.root.joinpath(".snakemake", "incomplete").glob("*")
    incomplete = {base64.urlsafe_b64decode(mark.name).decode() for mark in marks if mark.is_file()}
    return tuple(part for job in jobs if not incomplete.isdisjoint(job.outputs) for part in made_by(job))


def test_at_least_thirty_kills_struck(
    kills: list[str], request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    """Some come too late, after a job has ended; those that count must not become few unnoticed."""
    here = [item for item in request.session.items if item.path == Path(__file__)]
    if len(here) < len(STAGES) + 3:
        pytest.skip("only some of the kills were asked for")
    record_property("fact", f"{len(kills)} kills; FAULT_SEED={os.environ['FAULT_SEED']} repeats them")
    assert len(kills) >= 30, kills
