"""A strategy on variants of the wrong family is refused before anything runs, with what to do."""

import re
from typing import Any

import pytest

from evopress.compression.methods.drop import Drop
from evopress.compression.methods.gptq import Gptq
from evopress.compression.methods.sparsegpt import SparseGpt
from evopress.search.settings import (
    BruteSettings,
    DpSettings,
    EvolutionSettings,
    GreedySettings,
    OwlSettings,
    RandomSettings,
    ScoresSettings,
    SearchSettings,
    UniformSettings,
)
from evopress.workflow.families import level_problems

VARIANTS = {
    "gptq": Gptq(),
    "sparse": SparseGpt(),
    "patterned": SparseGpt(patterns=("2:4", "5:8")),
    "modules": Drop(),
    "blocks": Drop(unit="block"),
    "pairs": Drop(unit="pair"),
}


def problems(kind: Any, variants: str, target: float, **values: Any) -> list[str]:
    return list(level_problems("searches.x", kind(variants=variants, target=target, **values), VARIANTS))


@pytest.mark.parametrize(
    ("kind", "variants", "target", "values", "message"),
    [
        (ScoresSettings, "gptq", 3, {}, "strategy: scores drops whole blocks, but 'gptq' compresses layers"),
        (BruteSettings, "sparse", 0.5, {}, "strategy: brute drops whole blocks, but 'sparse' compresses layers"),
        (BruteSettings, "modules", 2, {}, "strategy: brute tries whole blocks.*set its `unit` to `block`"),
        (ScoresSettings, "pairs", 2, {}, "strategy: scores are of single blocks.*set its `unit` to `block`"),
        (DpSettings, "modules", 2, {}, "errors: modules that 'modules' drops have no errors.*choose `propagated`"),
        (UniformSettings, "blocks", 2, {}, "strategy: uniform chooses levels.*use `scores`, `greedy` or `evolution`"),
        (OwlSettings, "blocks", 2, {}, "strategy: owl chooses levels"),
        (UniformSettings, "gptq", 3.5, {}, "target: 3.5 bits is no level of 'gptq'.*choose one of 2, 3, 4, 5, 6"),
        (OwlSettings, "gptq", 3, {}, "variants: OWL chooses sparsities"),
        (GreedySettings, "blocks", 2.5, {}, "target: 2.5 is no number of blocks"),
        (BruteSettings, "pairs", 3, {}, "target: 3 blocks are no whole pairs"),
        (RandomSettings, "sparse", 3, {}, "target: 3 is no sparsity below 1"),
        (RandomSettings, "patterned", 0.6, {}, r"target: 0.6 sparsity is above the highest level \(0.5\)"),
        (GreedySettings, "gptq", 1, {}, "target: 1 bits is below the lowest level"),
        (DpSettings, "gpqt", 3, {}, "variants: no variants are named 'gpqt': did you mean 'gptq'"),
    ],
)
def test_what_does_not_go_together_is_refused(
    kind: type[SearchSettings], variants: str, target: float, values: dict[str, Any], message: str
) -> None:
    (found,) = problems(kind, variants, target, **values)
    assert re.match(f"searches.x.{message}", found), found


@pytest.mark.parametrize(
    ("kind", "variants", "target", "values"),
    [
        (ScoresSettings, "modules", 2, {}),
        (ScoresSettings, "blocks", 2, {"score": "kl"}),
        (BruteSettings, "blocks", 2, {}),
        (BruteSettings, "pairs", 2, {}),
        (GreedySettings, "modules", 2, {}),
        (DpSettings, "modules", 2, {"errors": "propagated"}),
        (DpSettings, "sparse", 0.5, {}),
        (DpSettings, "patterned", 0.5, {}),
        (RandomSettings, "gptq", 2.5, {}),
        (EvolutionSettings, "pairs", 2, {}),
    ],
)
def test_what_goes_together_passes(kind: Any, variants: str, target: float, values: dict[str, Any]) -> None:
    assert problems(kind, variants, target, **values) == []


def test_only_strategies_that_run_the_model_take_devices() -> None:
    four = {
        UniformSettings(variants="gptq", target=3): 0,
        DpSettings(variants="gptq", target=3): 0,
        OwlSettings(variants="sparse", target=0.5): 1,
        ScoresSettings(variants="blocks", target=2): 1,
        ScoresSettings(variants="blocks", target=2, score="perplexity"): 4,
        DpSettings(variants="gptq", target=3, errors="propagated"): 4,
        BruteSettings(variants="blocks", target=2): 4,
        GreedySettings(variants="blocks", target=2): 4,
        RandomSettings(variants="gptq", target=3): 4,
        EvolutionSettings(variants="gptq", target=3): 4,
    }
    for settings, devices in four.items():
        assert settings.workers(4) == devices, settings
