"""The strategies beside evolution through the workflow: run for real, and asked what runs again."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from planning import Checkout
from test_incremental import EDIT, edited, replaced

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import CONFIGURATION, EFFORT, read_table
from evopress.search.target import SizeTarget
from evopress.workflow.reference import rows
from evopress.workflow.settings import Settings

SEARCHES: dict[str, dict[str, Any]] = {
    "random": {
        "variants": "gptq",
        "target": 3.0,
        "generations": 2,
        "offspring": 4,
        "survivors": [1],
        "tokens": [64],
    },
    "greedy": {"variants": "blocks", "target": 1, "tokens": 64},
    "dp": {"variants": "gptq", "target": 2.5, "tokens": 64},
    "scores": {"variants": "blocks", "target": 1, "tokens": 64},
    "brute": {"variants": "blocks", "target": 1, "tokens": 64},
}
CHANGES: dict[str, dict[str, Any]] = {
    "random": {
        "target": 2.5,
        "generations": 3,
        "offspring": 5,
        "survivors": [2, 1],
        "tokens": [128],
        "fitness": "topk_kl",
        "top_k": 7,
        "group_rule": "name",
        "confidence": 0.9,
        "seed": 1,
    },
    "greedy": {
        "target": 2,
        "tokens": 128,
        "per_round": 2,
        "fitness": "perplexity",
        "top_k": 7,
        "group_rule": "none",
        "seed": 1,
    },
    "dp": {"target": 3, "errors": "propagated", "tokens": 128, "group_rule": "size", "resolution": 7, "seed": 1},
    "scores": {"target": 2, "score": "kl", "tokens": 128, "seed": 1},
    "brute": {"target": 2, "tokens": 128, "fitness": "perplexity", "top_k": 7, "max_candidates": 99, "seed": 1},
}
ELSEWHERE = {"strategy", "variants", "seeds", "exports", "tied", "levels", "polish"}
"""Settings whose rows are in test_incremental.py; they are the same for every strategy."""


@pytest.fixture(scope="module")
def several(settings: dict[str, Any]) -> dict[str, Any]:
    """The tiny run with one search of each strategy, named by it."""
    return {
        **settings,
        "variants": {**settings["variants"], "blocks": {"method": "drop", "unit": "block"}},
        "searches": {name: {"strategy": name, **content} for name, content in SEARCHES.items()},
    }


@pytest.fixture(scope="module")
def searched(finished: Checkout, several: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout in which all have searched."""
    root = tmp_path_factory.mktemp("strategies") / "evopress"
    shutil.copytree(finished.root, root)
    outcome = Checkout(root).run(several, *configurations())
    assert outcome.returncode == 0, outcome.stderr
    return Checkout(root)


def configurations() -> list[str]:
    return [str(Run(Path("results/tiny")).configuration(name)) for name in SEARCHES]


def test_every_strategy_searches_once_and_tells_its_effort(searched: Checkout, several: dict[str, Any]) -> None:
    run = Run(searched.root / "results/tiny")
    for name, search in SEARCHES.items():
        made = read_table(run.configuration(name), CONFIGURATION)
        if search["variants"] == "blocks":
            assert made.loc[made["level"] == "drop", "block"].nunique() == 1
        else:
            assert made["cost"].sum() <= search["target"] * made["parameters"].sum()
        spent = read_table(run.effort(name), EFFORT)["tokens"][0]
        assert (spent > 0) == (name != "dp")
    assert searched.plan(several, targets=configurations()) == set()


@pytest.mark.parametrize("number", range(max(map(len, CHANGES.values()))))
def test_a_setting_repeats_its_search_alone(
    searched: Checkout, several: dict[str, Any], sources: Path, number: int
) -> None:
    """One setting of each strategy at a time, as long as there are any (a plan takes a second or more)."""
    changes = {name: list(found.items())[number] for name, found in CHANGES.items() if number < len(found)}
    settings = several
    for name, (key, value) in changes.items():
        settings = replaced(settings, f"searches.{name}.{key}", value, sources)
        if key == "survivors":
            settings = replaced(settings, f"searches.{name}.tokens", [64, 128], sources)
    assert searched.plan(settings, targets=configurations()) == {f"search {name}" for name in changes}


@pytest.mark.parametrize("name", SEARCHES)
def test_every_setting_of_a_strategy_is_in_the_table(name: str) -> None:
    wanted = {row.path.rpartition(".")[2] for row in rows(Settings) if row.kind == name} - ELSEWHERE
    forms_of_a_target = set(SizeTarget.model_fields)
    assert wanted - forms_of_a_target == set(CHANGES[name])


def test_hessians_of_scores_are_not_asked_for(searched: Checkout, several: dict[str, Any], sources: Path) -> None:
    planned = searched.plan(
        replaced(several, "data.calibration.seed", 1, sources), targets=[configurations()[3], configurations()[4]]
    )
    assert planned == set()


def test_edited_code_of_a_strategy_repeats_searches(searched: Checkout, several: dict[str, Any]) -> None:
    with edited(searched.root / "evopress/search/budget.py", EDIT):
        assert searched.plan(several, targets=configurations()) == {f"search {name}" for name in SEARCHES}
