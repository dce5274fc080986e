"""A disk that is full or read-only, on a small file system of its own: errors that say where and what to do, and a run
that goes on once there is space.
"""

import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from planning import Job
from test_kills import check_nothing_looks_done, made_by
from tiny_run import Run

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs"),
]
STAGES = [
    "model",
    "tokens calibration",
    "hessians 1",
    "variants gptq 001",
    "variants_sequential chain 001",
    "search evo",
    "export evo huggingface",
    "export evo archive",
    "perplexity_dense",
    "tasks evo",
    "card evo huggingface",
    "report",
]
PAGE = 4096


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a file system of 24 MB is mounted; skips where that is not allowed."""
    folder = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def run(whole: Run, disk: Path) -> Iterator[Run]:
    """A copy of the whole run with its results on the small disk."""
    yield whole.copy(disk / "evopress")
    (disk / "ballast").unlink(missing_ok=True)
    shutil.rmtree(disk / "evopress")


def fill(disk: Path, free: int) -> Path:
    """Leave so many bytes free."""
    ballast, space = disk / "ballast", os.statvfs(disk)
    ballast.write_bytes(bytes(max(0, space.f_bavail * space.f_frsize - free)))
    return ballast


@contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """No writing for a while."""
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)


def size(run: Run, job: Job) -> int:
    """Bytes that a job writes, in whole pages."""
    files = [run.results / path for path in run.files() if path.startswith(made_by(job))]
    return sum(-(-file.stat().st_size // PAGE) * PAGE for file in files if not file.is_symlink())


FULL = re.compile(
    r"results/tiny\S*: (no space left on the disk; free some and run again|cannot be written .No space left on device.)"
)


@pytest.mark.parametrize("name", STAGES)
def test_a_full_disk_ends_with_an_error_and_with_space_the_run_goes_on(
    run: Run, disk: Path, name: str, dice: random.Random
) -> None:
    job, expected = run.job(name), run.contents()
    needed = size(run, job)  # what it replaces makes room before the last files are written
    run.make_way(job)
    ballast = fill(disk, dice.randrange(0, max(needed // 2, 1), PAGE))
    ended = run.again(job)
    assert ended.code == 1, ended.output
    assert FULL.search(ended.output), ended.output
    assert "Traceback" not in ended.output
    check_nothing_looks_done(run, job, expected, "full disk")
    ballast.unlink()
    assert run.leftovers() == []
    ended = run.start(job)
    assert ended.code == 0, ended.output
    after = run.contents()
    assert all(after.get(path, expected[path]) == expected[path] for path in expected)
    assert set(expected) - set(after) <= {f"exports/evo/huggingface/{name}" for name in ("README.md", "levels.png")}


@pytest.mark.parametrize("name", ["model", "tokens search", "hessians 0", "search even", "report"])
def test_a_read_only_folder_ends_with_an_error(run: Run, disk: Path, name: str) -> None:
    expected = run.contents()
    with read_only(disk):
        ended = run.again(run.job(name))
    assert ended.code == 1, ended.output
    assert "results/tiny" in ended.output and "cannot be written (Read-only file system); check" in ended.output
    assert "Traceback" not in ended.output
    assert run.contents() == expected


def test_damage_that_cannot_be_set_aside_is_named(run: Run, disk: Path) -> None:
    path = run.results / "tokens/calibration.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    command = run.job("hessians 0").command
    command = [*command[: command.index("--log")], *command[command.index("--log") + 2 :]]  # by hand, without a log
    with read_only(disk):
        ended = run.zygote.run(command, run.checkout.root)
    assert ended.code == 1, ended.output
    assert "it cannot be set aside (Read-only file system): delete results/tiny/tokens/calibration" in ended.output
