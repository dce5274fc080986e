"""Effects of single units where the model works in bfloat16: measured in float32, everything else in bfloat16."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from finished_run import BLOCKS, LAYERS
from search_run import artifacts, fresh, prepare

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import CONFIGURATION, TRACE, read_table
from evopress.config.compute import ComputeSettings
from evopress.config.context import StageContext
from evopress.config.data import PythonDocs
from evopress.config.model import FolderModel
from evopress.models.blockwise import BlockwiseModel
from evopress.plan.searches import SearchPlanner, memory_needed, requests_of
from evopress.plan.shape import shape_of
from evopress.search.base import RoundStrategy
from evopress.search.engine import precision
from evopress.search.engine.evaluator import search_text
from evopress.search.engine.precision import SearchEvaluator
from evopress.search.problem import SearchContext, open_problem
from evopress.search.resume import ResumeFolder
from evopress.search.run import run_search
from evopress.search.strategies.dp import DynamicProgramming
from evopress.search.strategies.evolution import Evolution
from evopress.util import device
from evopress.util.errors import ConfigError

COMPUTE = ComputeSettings(device="cpu", memory_gb=0.01)
EVOLUTION = Evolution(
    variants="gptq",
    target=7.0,
    group_rule="none",
    start="sensitivity",
    sensitivity_tokens=64,
    initial_tokens=48,
    generations=2,
    offspring=4,
    survivors=(1,),
    tokens=(48,),
)
DP = DynamicProgramming(variants="gptq", target=7.0, errors="kl", tokens=64)
UNITS = BLOCKS * len(LAYERS)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model in bfloat16, with levels so fine that rounding its hidden states does more than any one of them."""
    return prepare(tmp_path_factory.mktemp("effects"), bits=(6, 7, 8), dtype=torch.bfloat16)


@pytest.fixture
def run(prepared: Run, tmp_path: Path) -> Run:
    return fresh(prepared, tmp_path / "run")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.dtype]]:
    """Types in which models are opened, in order."""
    dtypes: list[torch.dtype] = []
    original = BlockwiseModel.from_folder

    def noted(*args: object, **options: object) -> BlockwiseModel:
        model = original(*args, **options)  # type: ignore[arg-type]
        dtypes.append(model.dtype)
        return model

    monkeypatch.setattr(BlockwiseModel, "from_folder", noted)
    yield dtypes


def works_in(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Let this machine's CPU be one that multiplies bfloat16, or one that does not."""
    monkeypatch.setattr(device, "_multiplies", lambda _: dtype == torch.bfloat16)


def search(run: Run, settings: RoundStrategy = EVOLUTION, name: str = "q") -> np.ndarray:
    """Effects of all units, each alone."""
    run_search(StageContext(run, COMPUTE), name, settings)
    trace = read_table(run.trace(name), TRACE)
    first = trace[(trace["generation"] == 0) & (trace["step"] == 0)]["fitness"].to_numpy()
    return first[1:] - first[0]


def test_effects_below_the_rounding_of_bfloat16_have_the_order_of_float32(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    works_in(monkeypatch, torch.float32)
    expected = search(run, name="wide")
    works_in(monkeypatch, torch.bfloat16)
    measured = search(run, name="mixed")
    monkeypatch.setattr(precision, "precise_dtype", lambda working: working)  # as if nothing asked for float32
    drowned = search(run, name="narrow")
    assert len(expected) == UNITS and (expected > 0).all()
    assert np.median(np.abs(drowned - expected)) > np.median(expected)  # rounding does more than a unit
    np.testing.assert_allclose(measured, expected, rtol=1e-2)
    assert np.argsort(measured).tolist() == np.argsort(expected).tolist()
    assert np.argsort(drowned).tolist() != np.argsort(expected).tolist()


def test_only_single_effects_are_measured_in_float32(
    run: Run, monkeypatch: pytest.MonkeyPatch, opened: list[torch.dtype]
) -> None:
    works_in(monkeypatch, torch.bfloat16)
    search(run)
    assert opened == [torch.float32, torch.bfloat16]
    opened.clear()
    search(run, DP, "dp")
    assert opened == [torch.float32]
    opened.clear()
    run_search(StageContext(run, COMPUTE), "even", EVOLUTION.model_copy(update={"start": "even"}))
    assert opened == [torch.bfloat16]


def test_where_float32_is_the_working_type_one_model_does_all(
    run: Run, monkeypatch: pytest.MonkeyPatch, opened: list[torch.dtype]
) -> None:
    works_in(monkeypatch, torch.float32)
    search(run)
    assert opened == [torch.float32]


@pytest.mark.parametrize("settings", [EVOLUTION, DP], ids=["evolution", "dp"])
@pytest.mark.parametrize("rounds", [1, 2])
def test_a_search_that_was_killed_ends_with_the_same_bytes(
    run: Run, settings: RoundStrategy, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DynamicProgramming, "part", 12)
    works_in(monkeypatch, torch.bfloat16)
    search(run, settings)
    whole = artifacts(run)
    original, saved = ResumeFolder.save, list[int]()

    def save_and_die(self: ResumeFolder, *args: object) -> None:
        original(self, *args)  # type: ignore[arg-type]
        saved.append(1)
        if len(saved) == rounds:
            raise KeyboardInterrupt

    run.configuration("q").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(ResumeFolder, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            search(run, settings)
    assert run.resume("q").exists() and not run.configuration("q").exists()
    search(run, settings)
    assert artifacts(run) == whole


def test_dp_sums_divergences_that_are_measured_on_the_beginnings_of_many_texts(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    works_in(monkeypatch, torch.bfloat16)
    search(run, DP)
    trace, chosen = read_table(run.trace("q"), TRACE), read_table(run.configuration("q"), CONFIGURATION)
    assert len(trace) == 3 * UNITS and (trace["tokens"] == 64).all()
    effects = trace["fitness"].to_numpy().reshape(UNITS, 3)
    assert (np.diff(effects, axis=1) < 0).mean() > 0.9  # a dearer level does less harm
    levels = chosen["level"].astype(int).to_numpy() - 6
    assert chosen["cost"].sum() <= 7 * chosen["parameters"].sum()
    assert effects[np.arange(UNITS), levels].sum() < effects[:, 1].sum()  # better than 7 bits everywhere


@pytest.mark.skipif(not device._multiplies(torch.bfloat16), reason="this CPU works in float32 anyway")
@pytest.mark.parametrize("settings", [EVOLUTION, DP], ids=["evolution", "dp"])
def test_two_processes_measure_what_one_measures(run: Run, settings: RoundStrategy) -> None:
    two = ComputeSettings(device="cpu", memory_gb=0.01, processes=2, threads=2)
    effects = search(run, settings)
    run_search(StageContext(run, two), "two", settings)
    trace = read_table(run.trace("two"), TRACE)
    first = trace[(trace["generation"] == 0) & (trace["step"] == 0)]["fitness"].to_numpy()
    np.testing.assert_allclose(first[1:] - first[0], effects, rtol=1e-2)


def test_the_plan_counts_what_is_measured_in_float32(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    works_in(monkeypatch, torch.bfloat16)
    problem = open_problem(run, EVOLUTION, "searches.q")
    context = SearchContext(run, COMPUTE, name="q", resume=ResumeFolder(run.resume("q"), "digest"))
    evaluator = SearchEvaluator(context, problem, search_text(run), EVOLUTION.minimizes(), lambda: None)
    rng = np.random.default_rng(0)
    state, _ = EVOLUTION.first_round(problem, evaluator, rng)
    while EVOLUTION.remaining(state, problem):
        state, _ = EVOLUTION.next_round(state, problem, evaluator, rng)

    shape = shape_of(FolderModel(path=str(run.model)), run)
    assert shape is not None and shape.on("cpu").dtype == torch.bfloat16
    planner = SearchPlanner(shape.on("cpu"), problem, PythonDocs(tokens=72, sequence_length=12), 0.01, "cpu")
    asked = requests_of(EVOLUTION, problem)
    assert [request.precise for request in asked] == [True, *[False] * (len(asked) - 1)]
    planned, counters = planner.plan(EVOLUTION, asked), evaluator.counters
    assert counters.candidate_tokens == planned.whole.candidate_tokens
    assert counters.head_tokens == planned.whole.head_tokens
    assert counters.block_tokens_alone == planned.whole.block_tokens_alone
    assert counters.peak_state_bytes == pytest.approx(planned.state_bytes, rel=0.1)
    apart = [planner.plan(EVOLUTION, [request for request in asked if request.precise == one]) for one in (True, False)]
    assert planned.memory_bytes == max(part.memory_bytes for part in apart)
    assert apart[0].dense_bytes == 64 * 16 * 4 and apart[1].dense_bytes == 72 * 16 * 2
    assert planned.rounds == EVOLUTION.generations


def test_memory_for_float32_is_asked_of_searches_that_measure_single_effects(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    works_in(monkeypatch, torch.bfloat16)
    shape = shape_of(FolderModel(path=str(run.model)), run)
    assert shape is not None
    least, more = (memory_needed(shape, 12, precise=precise) for precise in (False, True))
    assert least < more
    between = StageContext(run, ComputeSettings(device="cpu", memory_gb=(least + more) / 2e9))
    run_search(between, "even", EVOLUTION.model_copy(update={"start": "even"}))
    with pytest.raises(ConfigError, match=r"compute\.memory_gb: .* at least"):
        run_search(between, "q", EVOLUTION)
    run_search(StageContext(run, ComputeSettings(device="cpu", memory_gb=(more + 16) / 1e9)), "q", EVOLUTION)
