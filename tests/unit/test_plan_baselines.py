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
from evopress.plan.baselines import baseline_work
from evopress.plan.search import search_work
from evopress.plan.shape import ModelShape, shape_of
from evopress.plan.sharing import Unrelated
from evopress.search.base import Strategy
from evopress.search.engine.evaluator import ModelEvaluator
from evopress.search.engine.weights import Counters
from evopress.search.run import run_search
from evopress.search.strategies.brute import BruteForce
from evopress.search.strategies.dp import DynamicProgramming
from evopress.search.strategies.greedy import Greedy
from evopress.search.strategies.random import RandomSearch
from evopress.search.strategies.scores import BlockScores
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

    def noted(self, *args):
        init(self, *args)
        counters.append(self.counters)

    monkeypatch.setattr(ModelEvaluator, "__init__", noted)
    own = fresh(prepared, tmp_path / "run")
    run_search(StageContext(own, COMPUTE), "s", settings)
    table = VARIANTS[settings.variants].table(shape.layers, shape.itemsize, "variants.x")
    work = baseline_work(shape, table, settings, TEXT, 1.0, "cpu", "searches.s")
    spent = int(read_table(own.effort("s"), EFFORT)["tokens"][0])
    if isinstance(settings, Greedy):
        assert spent <= work.candidate_tokens <= 2.5 * spent
    else:
        assert spent == work.candidate_tokens
    if counters and not isinstance(settings, Greedy):
        teacher = 72 * shape.blocks if getattr(settings, "score", "") != "perplexity" else 0
        done = (counters[0].block_tokens + teacher) * shape.block_flops(12) + counters[0].head_tokens * shape.head_flops
        assert work.flops == pytest.approx(done, rel=1e-9 if not isinstance(settings, BruteForce) else 0.1)
    assert 0 < work.memory_bytes < 1e9


def test_random_candidates_share_no_work(prepared: Run, shape: ModelShape) -> None:
    settings = RandomSearch(variants="gptq", target=2.7, generations=4, offspring=5, survivors=(2, 1), tokens=(18, 48))
    table = VARIANTS["gptq"].table(shape.layers, shape.itemsize, "variants.gptq")
    random = search_work(shape, table, settings, TEXT, 1.0, "cpu", "searches.r")
    same = SETTINGS.model_copy(update={"offspring": 5, "survivors": (2, 1)})
    evolution = search_work(shape, table, same, TEXT, 1.0, "cpu", "searches.e")
    assert random.candidate_tokens == evolution.candidate_tokens == 5 * 18 + 3 * 48
    assert random.share == 1.0 > evolution.share
    assert random.unpacked_bytes > evolution.unpacked_bytes
    assert Unrelated((3, 1)).changed(1) == pytest.approx(2 / 3)


def test_a_plan_refuses_what_the_search_would(shape: ModelShape) -> None:
    settings = BruteForce(variants="blocks", target=1, max_candidates=1)
    table = VARIANTS["blocks"].table(shape.layers, shape.itemsize, "variants.blocks")
    with pytest.raises(ConfigError, match=r"searches.b.max_candidates: 1 of 2 can be dropped in 2 ways"):
        baseline_work(shape, table, settings, TEXT, 1.0, "cpu", "searches.b")
