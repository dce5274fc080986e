"""A strategy on variants of the wrong family is refused before anything runs, with what to do."""

import re
from typing import Any

import pytest

from evopress.compression.methods.drop import Drop
from evopress.compression.methods.gguf import Gguf
from evopress.compression.methods.gptq import Gptq
from evopress.compression.methods.pruning import SparseGpt
from evopress.search.base import Strategy
from evopress.search.strategies.brute import BruteForce
from evopress.search.strategies.dp import DynamicProgramming
from evopress.search.strategies.evolution import Evolution
from evopress.search.strategies.greedy import Greedy
from evopress.search.strategies.owl import Owl
from evopress.search.strategies.random import RandomSearch
from evopress.search.strategies.scores import BlockScores
from evopress.search.strategies.uniform import Uniform
from evopress.search.target import SizeTarget
from evopress.workflow.searches import strategy_problems

VARIANTS = {
    "gptq": Gptq(),
    "sparse": SparseGpt(),
    "patterned": SparseGpt(patterns=("2:4", "5:8")),
    "rounded": SparseGpt(bits=4),
    "types": Gguf(types=("Q4_0", "Q8_0")),
    "modules": Drop(),
    "blocks": Drop(unit="block"),
    "pairs": Drop(unit="pair"),
}


def problems(kind: Any, variants: str, target: float | SizeTarget, **values: Any) -> list[str]:
    return list(strategy_problems("searches.x", kind(variants=variants, target=target, **values), VARIANTS))


@pytest.mark.parametrize(
    ("kind", "variants", "target", "values", "message"),
    [
        (BlockScores, "gptq", 3, {}, "strategy: scores drops whole blocks, but 'gptq' compresses layers"),
        (BruteForce, "sparse", 0.5, {}, "strategy: brute drops whole blocks, but 'sparse' compresses layers"),
        (BruteForce, "modules", 2, {}, "strategy: brute tries whole blocks.*set its `unit` to `block`"),
        (BlockScores, "pairs", 2, {}, "strategy: scores are of single blocks.*set its `unit` to `block`"),
        (
            DynamicProgramming,
            "modules",
            2,
            {},
            "errors: modules that 'modules' drops have no errors.*choose `propagated`",
        ),
        (Uniform, "blocks", 2, {}, "strategy: uniform chooses levels.*use `scores`, `greedy` or `evolution`"),
        (Owl, "blocks", 2, {}, "strategy: owl chooses levels"),
        (Uniform, "gptq", 3.5, {}, "target: 3.5 bits is no level of 'gptq'.*choose one of 2, 3, 4, 5, 6"),
        (Owl, "gptq", 3, {}, "strategy: owl cannot choose from 'gptq', whose levels are bits"),
        (Owl, "sparse", SizeTarget(bytes=10**6), {}, "target: owl allots an average sparsity"),
        (Greedy, "blocks", 2.5, {}, "target: 2.5 is no number of blocks"),
        (BruteForce, "pairs", 3, {}, "target: 3 blocks are no whole pairs"),
        (RandomSearch, "sparse", 3, {}, "target: 3 is no sparsity below 1"),
        (RandomSearch, "rounded", 3, {}, "target: 3 is no sparsity below 1"),
        (RandomSearch, "patterned", 0.6, {}, r"target: 0.6 sparsity is above the highest level \(0.5\)"),
        (Greedy, "gptq", 1, {}, "target: 1 bits is below the lowest level"),
        (DynamicProgramming, "gpqt", 3, {}, "variants: no variants are named 'gpqt': did you mean 'gptq'"),
    ],
)
def test_what_does_not_go_together_is_refused(
    kind: type[Strategy], variants: str, target: float | SizeTarget, values: dict[str, Any], message: str
) -> None:
    (found,) = problems(kind, variants, target, **values)
    assert re.match(f"searches.x.{message}", found), found


@pytest.mark.parametrize(
    ("kind", "variants", "target", "values"),
    [
        (BlockScores, "modules", 2, {}),
        (BlockScores, "blocks", 2, {"score": "kl"}),
        (BruteForce, "blocks", 2, {}),
        (BruteForce, "pairs", 2, {}),
        (Greedy, "modules", 2, {}),
        (DynamicProgramming, "modules", 2, {"errors": "propagated"}),
        (DynamicProgramming, "sparse", 0.5, {}),
        (DynamicProgramming, "patterned", 0.5, {}),
        (RandomSearch, "gptq", 2.5, {}),
        (Owl, "rounded", 0.5, {}),
        (Evolution, "pairs", 2, {}),
        (Uniform, "types", 4.5, {}),
    ],
)
def test_what_goes_together_passes(kind: Any, variants: str, target: float, values: dict[str, Any]) -> None:
    assert problems(kind, variants, target, **values) == []


def test_only_strategies_that_run_the_model_take_devices() -> None:
    four = {
        Uniform(variants="gptq", target=3): 0,
        DynamicProgramming(variants="gptq", target=3): 0,
        Owl(variants="sparse", target=0.5): 1,
        BlockScores(variants="blocks", target=2): 1,
        BlockScores(variants="blocks", target=2, score="perplexity"): 4,
        DynamicProgramming(variants="gptq", target=3, errors="propagated"): 4,
        BruteForce(variants="blocks", target=2): 4,
        Greedy(variants="blocks", target=2): 4,
        RandomSearch(variants="gptq", target=3): 4,
        Evolution(variants="gptq", target=3): 4,
    }
    for settings, devices in four.items():
        assert settings.workers(4) == devices, settings
