"""Effects of single units where the model works in bfloat16: measured in float32, everything else in bfloat16."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from finished_run import BLOCKS, LAYERS
from search_run import artifacts, fresh, prepare, search_with_effects

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import (
    CONFIGURATION,
    EFFECTS,
    EFFORT,
    TRACE,
    read_provenance,
    read_table,
    write_table,
)
from evopress.config.context import ComputeSettings, StageContext
from evopress.config.data import PythonDocs
from evopress.config.model import FolderModel
from evopress.models.blockwise import BlockwiseModel
from evopress.plan.searches import requests_of, search_work
from evopress.plan.shape import shape_of
from evopress.search.effects import measure_effects
from evopress.search.engine import evaluator as engine
from evopress.search.engine.evaluator import SearchEvaluator, search_text
from evopress.search.engine.memory import least_memory
from evopress.search.offered import Constraints
from evopress.search.problem import RankContext, open_variants
from evopress.search.resume import ResumeFolder
from evopress.search.rounds import RoundStrategy
from evopress.search.run import run_search
from evopress.search.sensitivity import single_effects
from evopress.search.strategies.dp import DynamicProgramming
from evopress.search.strategies.evolution import Evolution
from evopress.util import device
from evopress.util.errors import ArtifactError, ConfigError

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
    monkeypatch.setattr(device, "_multiplies", lambda _, on: dtype == torch.bfloat16)


def effects_of(run: Run, compute: ComputeSettings = COMPUTE) -> np.ndarray:
    """Effects of all units, each alone."""
    asked = EVOLUTION.effects()
    assert asked is not None
    measure_effects(StageContext(run, compute), asked)
    return read_table(run.effects(asked.name), EFFECTS)["fitness"].to_numpy()


def search(run: Run, settings: RoundStrategy = EVOLUTION, name: str = "q") -> None:
    search_with_effects(StageContext(run, COMPUTE), name, settings)


def test_effects_below_the_rounding_of_bfloat16_have_the_order_of_float32(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    works_in(monkeypatch, torch.float32)
    expected = effects_of(run)
    works_in(monkeypatch, torch.bfloat16)
    measured = effects_of(run)
    monkeypatch.setattr(engine, "precise_dtype", lambda working: working)  # as if nothing asked for float32
    drowned = effects_of(run)
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
    run_search(StageContext(run, COMPUTE), "even", EVOLUTION.model_copy(update={"start": "uniform"}))
    assert opened == [torch.bfloat16]


def test_where_float32_is_the_working_type_one_model_does_all(
    run: Run, monkeypatch: pytest.MonkeyPatch, opened: list[torch.dtype]
) -> None:
    works_in(monkeypatch, torch.float32)
    search(run)
    assert opened == [torch.float32] * 2  # one of each job


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


@pytest.mark.skipif(
    not device._multiplies(torch.bfloat16, torch.device("cpu")), reason="this CPU works in float32 anyway"
)
def test_two_processes_measure_what_one_measures(run: Run) -> None:
    two = ComputeSettings(device="cpu", memory_gb=0.01, processes=2, threads=2)
    one = effects_of(run)
    np.testing.assert_allclose(effects_of(run, two), one, rtol=1e-2)
    run_search(StageContext(run, two), "two", DP)
    run_search(StageContext(run, COMPUTE), "one", DP)
    traces = [read_table(run.trace(name), TRACE)["fitness"].to_numpy() for name in ("one", "two")]
    np.testing.assert_allclose(*traces, rtol=1e-2)


def test_searches_with_another_target_seed_or_effort_share_their_effects(run: Run) -> None:
    asked = EVOLUTION.effects()
    for changes in ({"target": 6.5}, {"seed": 7}, {"generations": 9}, {"group_rule": "size"}, {"top_k": 3}):
        assert EVOLUTION.model_copy(update=changes).effects() == asked
    others = [{"levels": ("6", "7")}, {"tied": (("q_proj", "k_proj"),)}, {"fitness": "topk_kl"}, {"variants": "v"}]
    others += [{"sensitivity_tokens": 32}, {"sensitivity_levels": 2}]
    names = {EVOLUTION.model_copy(update=changes).effects().name for changes in others}  # type: ignore[union-attr]
    assert asked is not None and len(names | {asked.name}) == len(others) + 1
    assert EVOLUTION.model_copy(update={"start": "uniform"}).effects() is None
    search(run)
    kept = run.effects(asked.name).read_bytes()
    run_search(StageContext(run, COMPUTE), "lower", EVOLUTION.model_copy(update={"target": 6.5, "seed": 7}))
    assert run.effects(asked.name).read_bytes() == kept
    efforts = [read_table(path, EFFORT)["tokens"][0] for path in (run.effort("lower"), run.effects_effort(asked.name))]
    assert efforts[0] == read_table(run.trace("lower"), TRACE)["tokens"].sum() + efforts[1]
    assert efforts[1] == 64 * (1 + UNITS)


def test_a_search_starts_from_effects_at_two_levels(run: Run) -> None:
    two = EVOLUTION.model_copy(update={"sensitivity_levels": 2, "target": 6.5})
    search(run, two)
    asked = two.effects()
    assert asked is not None
    table = read_table(run.effects(asked.name), EFFECTS)
    assert list(table["level"]) == ["7"] * UNITS + ["6"] * UNITS
    assert list(table["unit"][:UNITS]) == list(table["unit"][UNITS:])
    assert table["fitness"][UNITS:].sum() > table["fitness"][:UNITS].sum() > 0
    assert read_table(run.effects_effort(asked.name), EFFORT)["tokens"][0] == 64 * (1 + 2 * UNITS)
    trace = read_table(run.trace("q"), TRACE)
    starts = trace[trace["generation"] == 0]
    assert 2 <= len(starts) <= 5 and starts["accepted"].sum() == 1  # two by fitness, two by a mean, the uniform one


def test_effects_that_are_missing_or_of_other_layers_are_refused(run: Run) -> None:
    asked = EVOLUTION.effects()
    assert asked is not None
    with pytest.raises(ArtifactError, match=r"effects\.parquet: missing; run the stage"):
        run_search(StageContext(run, COMPUTE), "q", EVOLUTION)
    measure_effects(StageContext(run, COMPUTE), asked)
    path = run.effects(asked.name)
    write_table(read_table(path, EFFECTS).iloc[1:], path, EFFECTS, read_provenance(path))
    with pytest.raises(ArtifactError, match="is of other layers or levels than the variants; delete it"):
        run_search(StageContext(run, COMPUTE), "q", EVOLUTION)


def test_the_plan_counts_what_is_measured_in_float32(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    works_in(monkeypatch, torch.bfloat16)
    effects = EVOLUTION.effects()
    assert effects is not None
    problem = open_variants(run, ["gptq"], Constraints("effects"))
    evaluator = SearchEvaluator(RankContext(run, COMPUTE), problem, search_text(run), effects.minimizes(), lambda: None)
    single_effects(problem.space, effects.tokens, evaluator, np.random.default_rng(0))

    shape = shape_of(FolderModel(path=str(run.model)), run)
    assert shape is not None and shape.on("cpu").dtype == torch.bfloat16
    asked, text = effects.requests(problem.space), PythonDocs(tokens=72, sequence_length=12)
    assert [request.precise for request in asked] == [True]
    compute = ComputeSettings(device="cpu", memory_gb=0.01)
    planned = search_work(shape.on("cpu"), problem, effects, asked, text, compute)
    counters = evaluator.counters
    assert counters.candidate_tokens == planned.whole.candidate_tokens == (1 + UNITS) * 64
    assert counters.head_tokens == planned.whole.head_tokens
    assert counters.block_tokens_alone == planned.whole.block_tokens_alone
    assert counters.peak_state_bytes == pytest.approx(planned.whole.peak_state_bytes, rel=0.1)
    assert planned.dense_bytes == 64 * 16 * 4
    assert not any(request.precise for request in requests_of(EVOLUTION, problem))


def test_memory_for_float32_is_asked_of_searches_that_measure_single_effects(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    works_in(monkeypatch, torch.bfloat16)
    cpu = torch.device("cpu")
    models = [BlockwiseModel.from_folder(run.model, cpu, resident=False, precise=precise) for precise in (False, True)]
    least, more = (least_memory(model, 12) for model in models)
    assert least < more
    between = StageContext(run, ComputeSettings(device="cpu", memory_gb=(least + more) / 2e9))
    run_search(between, "even", EVOLUTION.model_copy(update={"start": "uniform"}))
    effects = EVOLUTION.effects()
    assert effects is not None
    with pytest.raises(ConfigError, match=r"compute\.memory_gb: .* at least"):
        measure_effects(between, effects)
    measure_effects(StageContext(run, ComputeSettings(device="cpu", memory_gb=(more + 16) / 1e9)), effects)
