"""Depth pruning through the workflow: run for real on the tiny model, and asked what runs again."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from planning import Checkout
from test_incremental import EDIT, OTHER_SEARCH, edited, replaced
from transformers import AutoModelForCausalLM

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import CONFIGURATION, PERPLEXITY, read_table

SEARCH = {
    "strategy": "evolution",
    "variants": "blocks",
    "target": 1,
    "generations": 2,
    "offspring": 2,
    "survivors": [1],
    "tokens": [64],
    "initial_candidates": 2,
    "initial_tokens": 64,
}


@pytest.fixture(scope="module")
def pruned(settings: dict[str, Any]) -> dict[str, Any]:
    """With blocks that may be dropped, and a search that drops one."""
    return {
        **settings,
        "variants": {**settings["variants"], "blocks": {"method": "drop", "unit": "block", "exclude": ["*.0.mlp"]}},
        "searches": {**settings["searches"], "other": SEARCH},
    }


def test_a_depth_search_needs_no_hessians_and_ends_in_a_smaller_model(
    finished: Checkout, pruned: dict[str, Any], sources: Path, tmp_path: Path
) -> None:
    assert finished.plan(pruned) == OTHER_SEARCH | {"variants_modules blocks"}
    shutil.copytree(finished.root, tmp_path / "evopress")
    checkout = Checkout(tmp_path / "evopress")
    outcome = checkout.run(pruned)
    assert outcome.returncode == 0, outcome.stderr
    run = Run(checkout.root / "results/tiny")
    chosen = read_table(run.configuration("other"), CONFIGURATION)
    dropped = chosen[chosen["level"] == "drop"]["block"].unique().tolist()
    assert len(dropped) == 1 and dropped[0] in (1, 2)
    model = AutoModelForCausalLM.from_pretrained(run.export("other", "huggingface"))
    assert model.config.num_hidden_layers == 2
    assert read_table(run.perplexity("other"), PERPLEXITY)["kl"].item() > 0
    assert "other" in outcome.stdout

    assert checkout.plan(pruned) == set()
    variants = {"variants_modules blocks"}
    for path, value, expected in (
        ("variants.blocks.unit", "module", variants | OTHER_SEARCH),
        ("variants.blocks.exclude", [], variants | OTHER_SEARCH),
        ("searches.other.target", 2, OTHER_SEARCH),
        ("data.calibration.seed", 1, None),
    ):
        planned = checkout.plan(replaced(pruned, path, value, sources))
        if expected is None:
            assert not planned & {"variants_modules blocks", "search other"}
        else:
            assert planned == expected, path
    with edited(checkout.root / "evopress/compression/methods/drop.py", EDIT):
        assert checkout.plan(pruned) == variants | OTHER_SEARCH
    with edited(checkout.root / "evopress/compression/gptq.py", EDIT):
        assert not checkout.plan(pruned) & {"variants_modules blocks", "search other"}
