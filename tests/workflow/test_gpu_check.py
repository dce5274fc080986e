"""The check of GPU machines: all of it on a CPU at reduced size, and that it can fail."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS / "gpu"), str(TESTS / "benchmarks")]

import check  # noqa: E402 (lies on that path)
from parity import BITS, compare_codes  # noqa: E402
from random_models import Machine  # noqa: E402

from evopress.compression.gptq import Quantized, gptq  # noqa: E402
from evopress.plan.text import Rates  # noqa: E402


@pytest.mark.workflow
def test_the_whole_check_passes_on_a_cpu(tmp_path: Path) -> None:
    command = ["bash", str(TESTS / "gpu" / "check.sh"), "--device", "cpu", "--out", str(tmp_path / "out")]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads((tmp_path / "out" / "check.json").read_text())
    assert {name: facts["outcome"] for name, facts in found["checks"].items()} == dict.fromkeys(check.CHECKS, "ok")
    assert found["machine"]["sizes"] == "reduced"
    generation = found["checks"]["a generation of a search, 1B"]
    assert generation["times the plain evaluator"] > 0 < generation["share of the matrix rate"]
    measured = Rates.read(tmp_path / "out" / "check.json")
    assert set(measured.operations) == {"hessians", "variants", "search", "perplexity"}
    assert 0 < measured.unpack < math.inf == measured.disk, "nothing measures the disk"
    text = (tmp_path / "out" / "check.txt").read_text()
    assert all(f"{name}: ok" in text for name in check.CHECKS)


def quantized() -> tuple[torch.Tensor, torch.Tensor, Quantized]:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(4, 16, generator=generator), torch.randn(64, 16, generator=generator)
    first = gptq(weight, torch.eye(16), BITS)
    grid = first.scales[0, 0, 0].float(), first.zeros[0, 0, 0].float()
    weight[0, 0] = (1.5 - grid[1]) * grid[0]  # between codes 1 and 2 of the lowest level
    hessian = inputs.T @ inputs
    return weight, hessian, gptq(weight, hessian, BITS)


def test_a_code_that_differs_at_a_tie_is_explained_and_any_other_is_not() -> None:
    weight, hessian, here = quantized()
    assert compare_codes(weight, hessian, here, here) == (0, 0)
    codes = here.codes.clone()
    codes[0, 0, 0] ^= 3  # 1 becomes 2, or the other way round
    codes[0, 0, 5] ^= 1  # what comes after follows from it
    assert compare_codes(weight, hessian, here, changed(here, codes)) == (1, 0)
    codes[1, 2, 3] ^= 1
    assert compare_codes(weight, hessian, here, changed(here, codes)) == (2, 1)


def changed(found: Quantized, codes: torch.Tensor) -> Quantized:
    return Quantized(codes, found.scales, found.zeros, found.errors, found.damping)


def test_a_check_that_fails_is_reported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(machine: Machine) -> dict[str, object]:
        raise AssertionError("codes differ")

    monkeypatch.setattr(check, "CHECKS", {"first": broken, "second": lambda machine: {"tokens/s": 1234.5}})
    assert check.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "check.json").read_text())["checks"]
    assert (found["first"]["outcome"], found["first"]["error"]) == ("failed", "AssertionError: codes differ")
    assert found["second"]["tokens/s"] == 1234.5
    assert "second: ok" in capsys.readouterr().out


def test_no_check_starts_when_there_is_no_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "LIMIT_SECONDS", -1.0)
    found = check.run_checks(Machine(torch.device("cpu"), False, tmp_path))
    assert {facts["outcome"] for facts in found.values()} == {"left out: no time"}
