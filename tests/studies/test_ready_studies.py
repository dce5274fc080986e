"""Ready studies compare searches that judge equally many tokens: counted by the engine on a made-up objective."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from toy_search import problem_of

from evopress.compression.base import Level, Unit
from evopress.compression.families import BITS, SPARSITY
from evopress.search.evaluation import CountingEvaluator, Evaluation, Minibatch, draw_minibatch
from evopress.search.sensitivity import single_effects
from evopress.search.space import DENSE_LEVEL, Space, make_space
from evopress.search.strategies.evolution import Evolution
from evopress.search.strategies.random import RandomSearch
from evopress.workflow.settings import Settings, lay_over, read_yaml

REPOSITORY = Path(__file__).resolve().parents[2]
BLOCKS = 30
SIZES = (331776, 110592, 110592, 331776, 884736, 884736, 884736)
"""Weights of the layers of a block of the embedded model."""
SEQUENCE = 256


class _Objective:
    """Each level of a unit does a harm of its own, the less the dearer it is."""

    def __init__(self, space: Space, sequences: int) -> None:
        self.harm = np.sort(np.random.default_rng(0).random(space.costs.shape), axis=1)[:, ::-1]
        self.sequences = sequences

    def draw(self, tokens: int, rng: np.random.Generator, longest: int | None = None) -> Minibatch:
        return draw_minibatch(tokens, self.sequences, SEQUENCE, rng)

    def evaluate(self, candidates: np.ndarray, minibatch: Minibatch) -> list[Evaluation]:
        harm = np.where(candidates == DENSE_LEVEL, 0, self.harm[np.arange(len(self.harm)), candidates])
        return [Evaluation(float(value), (float(value),)) for value in harm.sum(axis=1)]


def space_of(variants: str) -> Space:
    """The embedded model's, as the studies' variants have it."""
    if variants in ("blocks", "modules"):
        levels, kinds = (
            (Level("drop", 1.0, 0, 0), Level("keep", 0.0, 1, 0)),
            ("attn", "mlp")[: 1 + (variants == "modules")],
        )
        units = [Unit(f"{block}.{kind}", block, kind, kind, 1, levels) for block in range(BLOCKS) for kind in kinds]
        return Space(tuple(units), (BLOCKS - 7,) * len(kinds))
    units = []
    for block in range(BLOCKS):
        for number, size in enumerate(SIZES):
            costs = _bits(size) if variants == "gptq" else _kept(size)
            levels = tuple(Level(str(cost), 0.5, cost, 0, 1 / cost) for cost in costs)
            units.append(Unit(f"{block}.{number}", block, str(number), "all", size, levels))
    return make_space(BITS, units, 3.0, "gptq") if variants == "gptq" else make_space(SPARSITY, units, 0.5, "sparse")


def _bits(size: int) -> Sequence[int]:
    return [bits * size for bits in range(2, 7)]


def _kept(size: int) -> Sequence[int]:
    return [size // 2 + 20_000 * step for step in range(-4, 5) if 0 <= size // 2 + 20_000 * step <= size]


@pytest.mark.parametrize(
    ("config", "tolerance"),
    [
        ("comparison-quantization", 0.01),  # a start from sensitivities costs what it costs
        ("comparison-sparsity", 0.01),
        ("comparison-depth", 0.01),
        ("mutation", 0),
        ("fitness", 0),
        ("steps", 0),
    ],
)
def test_searches_of_a_study_judge_equally_many_tokens(config: str, tolerance: float) -> None:
    base, overlay = (read_yaml(REPOSITORY / f"config/{name}.yaml") for name in ("config", f"studies/{config}"))
    settings = Settings.load(lay_over(base, overlay))
    spent = {}
    for name, search in settings.searches.items():
        if not isinstance(search, Evolution | RandomSearch) or search.seed:
            continue
        space = space_of(search.variants)
        assert settings.data.search.sequence_length == SEQUENCE
        evaluator = CountingEvaluator(_Objective(space, settings.data.search.tokens // SEQUENCE))
        rng = np.random.default_rng(search.seed)
        earlier = [space.top * 0 for _ in search.depends_on()]  # brought to the budget, as any other
        asked = search.effects()
        effects = single_effects(space, asked.tokens, evaluator, rng, asked.each) if asked else None
        before, problem = evaluator.tokens, problem_of(space, earlier, effects)
        state, rows = search.first_round(problem, evaluator, rng)
        while search.remaining(state, problem):
            state, more = search.next_round(state, problem, evaluator, rng)
            rows += more
        spent[name] = evaluator.tokens
        assert sum(row.record()["tokens"] for row in rows) == evaluator.tokens - before
    assert len(spent) > 1
    assert max(spent.values()) <= (1 + tolerance) * min(spent.values()), spent
