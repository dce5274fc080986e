"""What the plan says that each strategy judges, against what it then does."""

from pathlib import Path

import pytest
from finished_run import VOCABULARY
from search_run import COMPUTE, SETTINGS, fresh, prepare

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import EFFORT, read_table
from evopress.compression.base import Method
from evopress.compression.methods.drop import Drop, make_module_table
from evopress.compression.methods.gptq import Gptq
from evopress.config.context import StageContext
from evopress.config.data import FileText
from evopress.config.model import FolderModel
from evopress.plan.searches import SearchWork, requests_of, search_work
from evopress.plan.shape import ModelShape, shape_of
from evopress.search.base import Fitness, Strategy
from evopress.search.engine.evaluator import ModelEvaluator
from evopress.search.engine.weights import Counters
from evopress.search.problem import problem_of
from evopress.search.run import run_search
from evopress.search.strategies.brute import BruteForce
from evopress.search.strategies.dp import DynamicProgramming
from evopress.search.strategies.greedy import Greedy
from evopress.search.strategies.random import RandomSearch
from evopress.search.strategies.scores import BlockScores
from evopress.search.strategies.uniform import Uniform
from evopress.util.errors import ConfigError

VARIANTS: dict[str, Method] = {
    "gptq": Gptq(bits=(2, 3, 4), group_size=8),
    "depth": Drop(),
    "blocks": Drop(unit="block"),
}
TEXT = FileText(source="file", path="x.txt", tokens=72, sequence_length=12)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = prepare(tmp_path_factory.mktemp("plans"))
    for name, settings in VARIANTS.items():
        if isinstance(settings, Drop):
            make_module_table(StageContext(run), name, settings)
    return run


@pytest.fixture(scope="module")
def shape(prepared: Run) -> ModelShape:
    found = shape_of(FolderModel(source="folder", path=str(prepared.model)), prepared)
    assert found is not None and found.vocab_size == VOCABULARY
    return found


def planned(shape: ModelShape, settings: Strategy) -> SearchWork:
    table = VARIANTS[settings.variants].table(shape.layers, shape.itemsize, "variants.x")
    problem = problem_of({settings.variants: table}, settings.constraints("searches.s"))
    return search_work(shape, problem, settings, requests_of(settings, problem), TEXT, COMPUTE)


@pytest.mark.parametrize(
    "settings",
    [
        DynamicProgramming(variants="gptq", target=2.7, errors="propagated", tokens=30),
        BlockScores(variants="depth", target=1, score="kl", tokens=48),
        BlockScores(variants="blocks", target=1, score="perplexity", tokens=48),
        BlockScores(variants="blocks", target=1, score="cosine", tokens=48),
        BruteForce(variants="blocks", target=1, tokens=72),
        Greedy(variants="depth", target=1, tokens=24),
        Greedy(variants="gptq", target=2.7, tokens=24, per_round=4, group_rule="none"),
    ],
    ids=lambda settings: f"{settings.strategy}-{settings.variants}",
)
def test_tokens_and_work_are_those_of_the_search(
    prepared: Run, shape: ModelShape, tmp_path: Path, settings: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters: list[Counters] = []
    init = ModelEvaluator.__init__

    def noted(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if type(self) is ModelEvaluator:  # and not that of the plan
            counters.append(self.counters)

    monkeypatch.setattr(ModelEvaluator, "__init__", noted)
    own = fresh(prepared, tmp_path / "run")
    run_search(StageContext(own, COMPUTE), "s", settings)
    work = planned(shape, settings)
    spent = int(read_table(own.effort("s"), EFFORT)["tokens"][0])
    assert work.whole.candidate_tokens == pytest.approx(spent, rel=0.3 if settings.strategy == "greedy" else 1e-9)
    if counters:
        if settings.strategy != "greedy":
            assert counters[0].block_tokens == work.whole.block_tokens
            assert counters[0].head_tokens == work.whole.head_tokens
        teacher = 72 * len(shape.blocks) if getattr(settings, "score", "") != "perplexity" else 0
        done = (counters[0].block_tokens + teacher) * shape.block_flops(12) + counters[0].head_tokens * shape.head_flops
        # Of 30 tokens six are a shorter sequence, in which attention does less.
        assert work.whole.flops == pytest.approx(done, rel=0.3 if settings.strategy == "greedy" else 0.02)
    assert 0 < work.memory_bytes < 1e9


def test_random_candidates_share_no_work(shape: ModelShape) -> None:
    steps = {"offspring": 5, "survivors": (2, 1), "tokens": (18, 48)}
    random = planned(shape, RandomSearch(variants="gptq", target=2.7, generations=4, **steps))
    evolution = planned(shape, SETTINGS.model_copy(update={**steps, "generations": 4}))
    assert random.a_round.candidate_tokens == evolution.a_round.candidate_tokens == 5 * 18 + 3 * 48
    assert random.a_round.share_of_block_work == 1.0 > evolution.a_round.share_of_block_work
    assert random.in_rounds.unpacked_bytes > evolution.in_rounds.unpacked_bytes


def test_what_evaluates_nothing_takes_nothing(shape: ModelShape) -> None:
    work = planned(shape, Uniform(variants="gptq", target=3))
    assert (work.memory_bytes, work.whole.flops, work.rounds) == (0, 0, 0)


def test_a_strategy_that_keeps_quiet_on_what_it_evaluates_is_not_planned_as_nothing(shape: ModelShape) -> None:
    class Quiet(Uniform):
        def minimizes(self) -> Fitness:
            return Fitness("kl")

    with pytest.raises(NotImplementedError, match="Quiet evaluates candidates"):
        planned(shape, Quiet(variants="gptq", target=3))


def test_a_plan_refuses_what_the_search_would(shape: ModelShape) -> None:
    settings = BruteForce(variants="blocks", target=1, max_candidates=1)
    with pytest.raises(ConfigError, match=r"searches.s.max_candidates: 1 of 2 can be dropped in 2 ways"):
        planned(shape, settings)
