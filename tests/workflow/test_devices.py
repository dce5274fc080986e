"""A workstation with two (fake) GPUs: Snakemake counts them, and jobs that run at once lease different ones."""

import re
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from planning import Checkout

LISTING = """GPU 0: Fake (UUID: GPU-00000000-aaaa)
GPU 1: Fake (UUID: GPU-11111111-bbbb)
GPU 2: Fake (UUID: GPU-22222222-cccc)
"""
CUDA_TORCH = "import evopress.accelerators as accelerators\naccelerators.built_for_cuda = lambda: True\n"


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


def leases_of(checkout: Checkout) -> tuple[list[str], bool]:
    """Devices that the variants' jobs leased, and whether one had to wait."""
    logs = [path.read_text() for path in checkout.root.glob("results/tiny/logs/variants/gptq/*.log")]
    return [name for log in logs for name in re.findall(r"leased (\S+)", log)], any(
        "waiting for" in log for log in logs
    )


def test_jobs_lease_the_visible_devices_and_snakemake_counts_them(
    workstation: Checkout, settings: dict[str, Any], tmp_path: Path
) -> None:
    other, targets = changed(settings, "auto")
    outcome = workstation.run(other, *targets, cores=4)
    assert outcome.returncode == 0, outcome.stderr
    leases, waited = leases_of(workstation)
    assert len(leases) == 3 and set(leases) == {"0", "2"}
    assert not waited  # the third job was not even started before
    locks = {path.name for path in (tmp_path / "locks").iterdir()}
    assert locks == {"evopress-device-GPU-00000000-aaaa.lock", "evopress-device-GPU-22222222-cccc.lock"}


def test_jobs_that_are_to_run_on_cpus_lease_nothing(
    workstation: Checkout, settings: dict[str, Any], tmp_path: Path
) -> None:
    other, targets = changed(settings, "cpu")
    outcome = workstation.run(other, targets[0])
    assert outcome.returncode == 0, outcome.stderr
    assert not list((tmp_path / "locks").iterdir())


def test_what_the_user_says_counts(workstation: Checkout, settings: dict[str, Any]) -> None:
    other, targets = changed(settings, "auto")
    outcome = workstation.run(other, *targets, "--resources", "gpu=1")
    assert outcome.returncode == 0, outcome.stderr
    leases, waited = leases_of(workstation)
    assert leases == ["2", "2", "2"] and not waited
