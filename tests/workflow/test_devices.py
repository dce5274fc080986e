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


def test_jobs_lease_the_visible_devices_and_snakemake_counts_them(
    workstation: Checkout, settings: dict[str, Any], tmp_path: Path
) -> None:
    other, targets = changed(settings, "auto")
    outcome = workstation.run(other, *targets, cores=4)
    assert outcome.returncode == 0, outcome.stderr
    assert "Provided resources: gpu=2" in outcome.stderr
    logs = [path.read_text() for path in workstation.root.glob("results/tiny/logs/variants/gptq/*.log")]
    leases = [re.findall(r"leased (\S+)", log) for log in logs]
    assert len(leases) == 3 and {len(found) for found in leases} == {1}
    assert {found[0] for found in leases} == {"0", "2"}  # three jobs, two at a time
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
    assert "Provided resources: gpu=1" in outcome.stderr
