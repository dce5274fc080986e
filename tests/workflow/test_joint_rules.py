"""A search over several variants through the workflow: run for real on the tiny model, and asked what runs again."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from planning import Checkout
from test_incremental import OTHER_SEARCH

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import CONFIGURATION, read_table

SEARCH = {
    "strategy": "evolution",
    "variants": ["gptq", "modules"],
    "target": {"fraction": 0.3},
    "start": "sensitivity",
    "sensitivity_tokens": 32,
    "generations": 2,
    "offspring": 2,
    "survivors": [1],
    "tokens": [64],
    "initial_candidates": 2,
    "initial_tokens": 64,
}


@pytest.fixture(scope="module")
def joint(settings: dict[str, Any]) -> dict[str, Any]:
    """With modules that may be dropped, and a search over bits and modules."""
    return {
        **settings,
        "variants": {**settings["variants"], "modules": {"method": "drop"}},
        "searches": {**settings["searches"], "other": SEARCH},
    }


def planned(checkout: Checkout, settings: dict[str, Any]) -> set[str]:
    """Jobs that would run; single effects without the digest in their name."""
    return {"effects" if job.startswith("effects gptq-modules-") else job for job in checkout.plan(settings)}


def test_a_joint_search_runs_and_runs_again_for_each_of_its_variants(
    finished: Checkout, joint: dict[str, Any], tmp_path: Path
) -> None:
    assert planned(finished, joint) == OTHER_SEARCH | {"variants_modules modules", "effects"}
    shutil.copytree(finished.root, tmp_path / "evopress")
    checkout = Checkout(tmp_path / "evopress")
    outcome = checkout.run(joint)
    assert outcome.returncode == 0, outcome.stderr
    run = Run(checkout.root / "results/tiny")
    chosen = read_table(run.configuration("other"), CONFIGURATION)
    assert set(chosen["variants"]) == {"gptq", "modules"}
    assert planned(checkout, joint) == set()
    changed = {**joint, "variants": {**joint["variants"], "modules": {"method": "drop", "exclude": ["*.0.mlp"]}}}
    assert planned(checkout, changed) == OTHER_SEARCH | {"variants_modules modules", "effects"}
