"""A polish in the workflow: run for real beside the search that it starts from, and asked what runs again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from planning import Checkout
from test_incremental import EDIT, edited, replaced

from evopress.artifacts.exports import load_export_manifest
from evopress.artifacts.paths import Run
from evopress.artifacts.tables import PERPLEXITY, read_table

POLISHED = {"polish better"} | {f"{stage} better" for stage in ("perplexity", "tasks")} | {"report"}
POLISHED |= {"export better huggingface", "card better huggingface"}


@pytest.fixture(scope="module")
def better(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with a second search that takes the levels of the first, and polishes them."""
    same = {"strategy": "imported", "same_as": "evo", "variants": "gptq", "target": 3.0, "polish": "asymmetric"}
    return {**settings, "searches": {"better": same, **settings["searches"]}}  # in the order of a file


@pytest.fixture(scope="module")
def ended(finished: Checkout, better: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A finished checkout in which that search has ended as well."""
    root = tmp_path_factory.mktemp("polished") / "evopress"
    shutil.copytree(finished.root, root)
    checkout = Checkout(root)
    assert checkout.plan(better) == POLISHED | {"search better"}, "the first search is not made again"
    outcome = checkout.run(better)
    assert outcome.returncode == 0, outcome.stderr
    return checkout


def test_before_and_after_are_told_side_by_side(ended: Checkout) -> None:
    run = Run(ended.root / "results/tiny")
    kl = {name: read_table(run.perplexity(name), PERPLEXITY)["kl"].iloc[0] for name in ("evo", "better")}
    assert kl["evo"] != kl["better"]
    settings = json.loads(load_export_manifest(run.export_manifest("better", "huggingface"))["provenance"]["settings"])
    assert settings["polish"] == "asymmetric"
    card = run.card("better", "huggingface").read_text()
    assert "taken from the search `evo`" in card and "The model was polished" in card and "2504.02692" in card
    assert "The model was polished" not in run.card("evo", "huggingface").read_text()
    assert "polished (asymmetric, " in run.report.read_text()
    assert not run.polish_state("better").parent.exists()


def test_a_polish_runs_again_with_what_it_depends_on(ended: Checkout, better: dict[str, Any], sources: Path) -> None:
    assert ended.plan(better) == set()
    evo = {job.replace("better", "evo") for job in POLISHED - {"polish better"}}
    calibration = {"tokens calibration", "hessians", "variants gptq"}
    chosen = {"search evo", "search better"} | evo | POLISHED
    changes: list[tuple[str, Any, set[str]]] = [
        ("searches.better.polish", "sequential", POLISHED),
        ("searches.better.polish", "none", POLISHED - {"polish better"}),
        ("searches.better.exports", ["huggingface"], set()),
        ("searches.evo.generations", 3, chosen),
        ("variants.gptq.damping", 0.02, {"variants gptq"} | chosen),
        ("data.calibration.seed", 1, calibration | chosen),
        (
            "data.evaluation.held.seed",
            1,
            {
                "tokens held",
                "perplexity_dense",
                "perplexity evo",
                "perplexity better",
                "card evo huggingface",
                "card better huggingface",
                "report",
            },
        ),
        ("evaluation.tasks.limit", 5, {"tasks_dense", "tasks evo", "tasks better", "report"}),
        ("compute.threads", 1, set()),
    ]
    for path, value, expected in changes:
        assert ended.plan(replaced(better, path, value, sources)) == expected, path
    with edited(ended.root / "evopress/search/polish.py", EDIT):
        assert ended.plan(better) == POLISHED
    with edited(ended.root / "evopress/compression/methods/gptq.py", EDIT):
        assert ended.plan(better) == {"variants gptq"} | chosen


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("searches.better.same_as", "evu", "searches.better.same_as: no search is named 'evu': did you mean 'evo'?"),
        ("searches.better.file", "levels.txt", "name either a `file` or, as `same_as`, another search"),
        ("searches.better.polish", "twice", "searches.better.polish"),
    ],
)
def test_what_cannot_be_ends_before_anything_runs(
    ended: Checkout, better: dict[str, Any], sources: Path, path: str, value: str, message: str
) -> None:
    outcome = ended.run(replaced(better, path, value, sources), "--dry-run")
    assert outcome.returncode == 1
    assert message in outcome.stdout + outcome.stderr
