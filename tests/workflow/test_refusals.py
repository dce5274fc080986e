"""Bad input through the real command: a clear line, a non-zero exit, and nothing half written."""

import re
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from planning import Checkout


@pytest.fixture
def fresh(tmp_path: Path) -> Checkout:
    return Checkout.make(tmp_path / "evopress")


@pytest.fixture
def copied(finished: Checkout, tmp_path: Path) -> Checkout:
    """A copy of the finished checkout, with Snakemake's records, that a test may spoil."""
    shutil.copytree(finished.root, tmp_path / "evopress")
    return Checkout(tmp_path / "evopress")


def with_(settings: dict[str, Any], *path: str, value: Any) -> dict[str, Any]:
    changed = deepcopy(settings)
    place = changed
    for section in path[:-1]:
        place = place[section]
    place[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("nam",), "x", "settings: unknown key 'nam': did you mean 'name'?"),
        (("searches", "evo", "target"), 1.5, "searches.evo.target: 1.5 bits is below the lowest level (2)"),
        (("searches", "evo", "variants"), "gptg", "searches.evo.variants: no variants are named 'gptg'"),
        (("variants", "gptq"), {"method": "sparsegpt", "sparsity": 1}, "variants.gptq.sparsity: Input should be less"),
        (("variants", "gptq"), {"method": "wanda", "sparsity": 0}, "variants.gptq.sparsity: Input should be greater"),
        (("name",), "../elsewhere", "name: '../elsewhere' cannot name a file"),
        (("name",), "a;touch b", "name: 'a;touch b' cannot name a file"),
        (("model", "path"), "/no/such/folder", "/no/such/folder"),
        (("data", "search", "path"), "/no/such/text.txt", "/no/such/text.txt: is no file"),
        (
            ("evaluation", "tasks", "include_path"),
            "no/tasks",
            "evaluation.tasks.include_path: 'no/tasks' is not a folder",
        ),
    ],
)
def test_wrong_settings_end_before_anything_runs(
    fresh: Checkout, settings: dict[str, Any], path: tuple[str, ...], value: Any, message: str
) -> None:
    outcome = fresh.run(with_(settings, *path, value=value))
    assert outcome.returncode == 1
    assert message in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert not (fresh.root / "results").exists()


def test_a_failing_job_tells_why_and_leaves_no_artifact(copied: Checkout, settings: dict[str, Any]) -> None:
    outcome = copied.run(with_(settings, "variants", "gptq", "group_size", value=7))
    assert outcome.returncode == 1
    assert "Traceback" not in outcome.stderr
    failed = set(re.findall(r"model\.layers\.(\d)\.self_attn\.q_proj.*: group_size 7 does not divide", outcome.stderr))
    assert failed
    for block in failed:
        assert list((copied.root / "results/tiny/variants/gptq").glob(f"*block_00{block}*")) == []


def test_results_of_other_settings_are_refused_where_snakemake_does_not_know_them(
    finished: Checkout, fresh: Checkout, settings: dict[str, Any]
) -> None:
    shutil.copytree(finished.root / "results", fresh.root / "results")
    before = {path: path.stat().st_mtime_ns for path in fresh.root.joinpath("results").rglob("*")}
    outcome = fresh.run(with_(settings, "searches", "evo", "generations", value=7))
    assert outcome.returncode == 1
    assert "search/evo/configuration.parquet: was made by other settings (generations: 2, now 7)" in outcome.stderr
    assert "Choose another `name`" in outcome.stderr
    assert before == {path: path.stat().st_mtime_ns for path in fresh.root.joinpath("results").rglob("*")}


def test_results_of_the_same_settings_are_no_error(
    finished: Checkout, fresh: Checkout, settings: dict[str, Any]
) -> None:
    shutil.copytree(finished.root / "results", fresh.root / "results")
    fresh.plan(settings)  # what it repeats depends on the times of the copied files


def test_other_settings_are_no_error_where_snakemake_knows_what_made_the_results(
    copied: Checkout, settings: dict[str, Any]
) -> None:
    assert "search evo" in copied.plan(with_(settings, "searches", "evo", "generations", value=7))
