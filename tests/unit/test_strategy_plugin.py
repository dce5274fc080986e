"""A strategy from outside of the package, which everything serves without an edit."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from finished_run import write_tokens
from plugins.annealing import Annealing
from search_run import COMPUTE, artifacts, fresh, prepare

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import CONFIGURATION, EFFORT, TRACE, read_provenance, read_table
from evopress.config.context import StageContext
from evopress.config.evaluation import TaskSettings
from evopress.evaluation.perplexity import evaluate_perplexity
from evopress.evaluation.tasks import evaluate_tasks
from evopress.export.card import write_card
from evopress.export.exporters.huggingface import HuggingFace
from evopress.export.stage import run_export
from evopress.report.page import write_report
from evopress.search.engine.evaluator import ModelEvaluator
from evopress.search.run import open_problem, run_search
from evopress.search.strategies import STRATEGIES
from evopress.util.errors import ConfigError
from evopress.workflow.reference import reference, schema
from evopress.workflow.settings import Settings

TEXT = {"source": "python_docs", "tokens": 4096, "sequence_length": 512}
ANNEALING = Annealing(variants="gptq", target=2.7, moves=12, tokens=48, seed=1, temperature=1.0)


@pytest.fixture(autouse=True)
def annealing() -> Iterator[None]:
    """The one line that registers it; undone after the test."""
    STRATEGIES.register(Annealing)
    yield
    STRATEGIES.plugins.remove(Annealing)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prepare(tmp_path_factory.mktemp("annealing"))


@pytest.fixture
def run(prepared: Run, tmp_path: Path) -> Run:
    return fresh(prepared, tmp_path / "run")


def settings(**search: object) -> Settings:
    return Settings.load(
        {
            "name": "run",
            "model": {"source": "folder", "path": "/nowhere"},
            "data": {"calibration": TEXT, "search": TEXT, "evaluation": {"held_out": TEXT}},
            "variants": {"gptq": {"method": "gptq"}},
            "searches": {"s": {"strategy": "annealing", "variants": "gptq", "target": 3, **search}},
        }
    )


def test_settings_take_it_and_check_it() -> None:
    assert settings(moves=7).searches["s"] == Annealing(variants="gptq", target=3, moves=7)
    assert list(settings(seeds=[0, 1]).searches) == ["s-seed0", "s-seed1"]
    with pytest.raises(ConfigError, match=r"searches\.s: unknown key 'move': did you mean 'moves'\?"):
        settings(move=7)
    with pytest.raises(ConfigError, match=r"searches\.s: unknown strategy 'anealing': did you mean 'annealing'\?"):
        settings(strategy="anealing")
    with pytest.raises(ConfigError, match=r"searches\.s\.tokens: 9999 tokens are more than data\.search\.tokens has"):
        settings(tokens=9999)


def test_schema_and_reference_know_it() -> None:
    whole = json.loads(schema())
    kinds = whole["properties"]["searches"]["additionalProperties"]["discriminator"]["mapping"]
    assert kinds["annealing"] == "#/$defs/Annealing" and "Annealing" in whole["$defs"]
    assert "`annealing`: Simulated annealing: one candidate moves" in reference()


def test_a_search_keeps_the_best_within_the_budget(run: Run) -> None:
    run_search(StageContext(run, COMPUTE), "s", ANNEALING)
    made, trace = read_table(run.configuration("s"), CONFIGURATION), read_table(run.trace("s"), TRACE)
    assert 2.55 < made["cost"].sum() / made["parameters"].sum() <= 2.7
    assert trace["generation"].max() == 12 and trace["accepted"].sum() > 0
    problem = open_problem(run, ANNEALING, "searches.s")
    asked = ANNEALING.evaluations(problem, np.random.default_rng(0))
    planned = sum(len(request.candidates) * request.tokens * request.times for request in asked)
    assert 0 < read_table(run.effort("s"), EFFORT)["tokens"][0] <= round(planned) == 12 * 3 * 48
    card = STRATEGIES.parse(json.loads(read_provenance(run.configuration("s")).settings), "card")
    assert card.sentence() == "found by simulated annealing"


def test_its_models_are_written_and_told_of(run: Run) -> None:
    context = StageContext(run, COMPUTE)
    run_search(context, "s", ANNEALING)
    run_export(context, "s", HuggingFace())
    write_card(context, "s", HuggingFace())
    assert "The levels are found by simulated annealing (search `s`)." in run.card("s", "huggingface").read_text()
    write_tokens(run, "held_out")
    for model in ("dense", "s"):
        evaluate_perplexity(context, model, ["held_out"])
        evaluate_tasks(context, model, TaskSettings())
    write_report(context, ["s"], [run.export("s", "huggingface")])
    page = run.report.read_text()
    assert "annealing, 2.7 bits per weight asked" in page and "12 rounds" in page


def test_a_search_that_was_cut_short_ends_with_the_same_bytes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fresh(run, "whole")
    run_search(StageContext(whole, COMPUTE), "q", ANNEALING)
    evaluate, calls = ModelEvaluator.evaluate, []

    def dying(self: ModelEvaluator, *arguments: object) -> object:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return evaluate(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ModelEvaluator, "evaluate", dying)
        run_search(StageContext(run, COMPUTE), "q", ANNEALING)
    assert not run.configuration("q").exists()
    run_search(StageContext(run, COMPUTE), "q", ANNEALING)
    assert artifacts(run) == artifacts(whole)
