"""A workstation with two (fake) GPUs: Snakemake counts them, and jobs that run at once lease different ones."""

import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from planning import Checkout

from evopress.util.accelerators import Device, leased

LISTING = """GPU 0: Fake (UUID: GPU-00000000-aaaa)
GPU 1: Fake (UUID: GPU-11111111-bbbb)
GPU 2: Fake (UUID: GPU-22222222-cccc)
"""
CUDA_TORCH = "import evopress.util.accelerators as accelerators\naccelerators.built_for_cuda = lambda: True\n"


@pytest.fixture
def workstation(finished: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    """A copy of the finished checkout on a machine with three devices, of which two are visible."""
    shutil.copytree(finished.root, tmp_path / "evopress")
    (tmp_path / "evopress" / "sitecustomize.py").write_text(CUDA_TORCH)
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{LISTING}END\n")
    program.chmod(0o755)
    (tmp_path / "locks").mkdir()
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setenv("EVOPRESS_LEASES", str(tmp_path / "locks"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    return Checkout(tmp_path / "evopress")


def changed(settings: dict[str, Any], device: str) -> tuple[dict[str, Any], list[str]]:
    """Settings that make all variants again, and these as targets."""
    other = deepcopy(settings)
    other["variants"]["gptq"]["group_size"] = 8
    other["compute"] = {"device": device}
    return other, [f"results/tiny/variants/gptq/block_{block:03d}.parquet" for block in range(3)]


def logs_of(checkout: Checkout) -> list[str]:
    """The variants' logs that are there; Snakemake removes an earlier run's when a job starts."""
    logs = []
    for path in checkout.root.glob("results/tiny/logs/variants/gptq/*.log"):
        with suppress(FileNotFoundError):
            logs.append(path.read_text())
    return logs


def leases_of(checkout: Checkout) -> list[str]:
    """Devices that the variants' jobs leased."""
    return [name for log in logs_of(checkout) for name in re.findall(r"leased (\S+)", log)]


def waiting(checkout: Checkout) -> int:
    """Jobs that had to wait for a device."""
    return sum("waiting for" in log for log in logs_of(checkout))


def held(folder: Path, *identities: str) -> AbstractContextManager[list[Device]]:
    """Devices that another user holds, who names them otherwise."""
    devices = [Device(identity, identity) for identity in identities]
    return leased("auto", len(devices), environment={"EVOPRESS_LEASES": str(folder)}, find=lambda _: devices)


def test_jobs_lease_the_visible_device_that_nobody_holds(
    workstation: Checkout, settings: dict[str, Any], tmp_path: Path
) -> None:
    other, targets = changed(settings, "auto")
    with held(tmp_path / "locks", "GPU-22222222-cccc"):
        outcome = workstation.run(other, targets[0])
    assert outcome.returncode == 0, outcome.stderr
    assert leases_of(workstation) == ["0"]
    locks = {path.name for path in (tmp_path / "locks").iterdir()}
    assert locks == {"evopress-device-GPU-00000000-aaaa.lock", "evopress-device-GPU-22222222-cccc.lock"}


@pytest.mark.parametrize(("options", "together"), [((), 2), (("--resources", "gpu=1"), 1)])
def test_snakemake_starts_no_more_jobs_than_there_are_devices_unless_told(
    workstation: Checkout, settings: dict[str, Any], tmp_path: Path, options: tuple[str, ...], together: int
) -> None:
    other, targets = changed(settings, "auto")
    with ThreadPoolExecutor() as pool:
        with held(tmp_path / "locks", "GPU-00000000-aaaa", "GPU-22222222-cccc"):
            running = pool.submit(workstation.run, other, *targets, *options, cores=4)
            deadline = time.monotonic() + 300
            while waiting(workstation) < together and not running.done() and time.monotonic() < deadline:
                time.sleep(0.1)
            time.sleep(10)  # in which one more could have come
            assert waiting(workstation) == together
        outcome = running.result()
    assert outcome.returncode == 0, outcome.stderr
    leases = leases_of(workstation)
    assert len(leases) == 3 and set(leases) <= {"0", "2"}


def test_jobs_that_are_to_run_on_cpus_lease_nothing(
    workstation: Checkout, settings: dict[str, Any], tmp_path: Path
) -> None:
    other, targets = changed(settings, "cpu")
    outcome = workstation.run(other, targets[0])
    assert outcome.returncode == 0, outcome.stderr
    assert not list((tmp_path / "locks").iterdir())
