"""The progress of a search: the best so far on one fixed part of the text, for little, and without any say in it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from search_run import COMPUTE, MIXED, SETTINGS, fresh, prepare

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import CONFIGURATION, EFFORT, PROGRESS, TRACE, read_table
from evopress.config.context import StageContext
from evopress.search import progress
from evopress.search.engine.evaluator import SearchEvaluator, search_text
from evopress.search.problem import SearchContext
from evopress.search.progress import fixed_part
from evopress.search.resume import ResumeFolder
from evopress.search.run import open_problem, run_search
from evopress.search.strategies.greedy import Greedy
from evopress.search.strategies.uniform import Uniform


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prepare(tmp_path_factory.mktemp("progress"))


@pytest.fixture
def run(prepared: Run, tmp_path: Path) -> Run:
    return fresh(prepared, tmp_path / "run")


def test_the_last_row_is_what_was_found_and_the_uniform_choice_is_that_of_the_baseline(run: Run) -> None:
    run_search(StageContext(run, COMPUTE), "q", SETTINGS)
    run_search(StageContext(run, COMPUTE), "flat", Uniform(variants="gptq", target=3.0))
    way, effort = read_table(run.progress("q"), PROGRESS), read_table(run.effort("q"), EFFORT)
    assert way["candidate"].tolist() == ["uniform"] + ["best"] * (len(way) - 1)
    first, last = way.iloc[1], way.iloc[-1]
    assert (first["generation"], last["generation"]) == (0, SETTINGS.generations)
    assert way["tokens"].is_monotonic_increasing and way["seconds"].is_monotonic_increasing
    assert last["tokens"] == effort["tokens"].item() and last["seconds"] == pytest.approx(effort["seconds"].item())
    assert _fitness(run, "flat", way["part"].iloc[0]) == pytest.approx(way["fitness"].iloc[0], rel=1e-4)
    assert _fitness(run, "q", last["part"]) == pytest.approx(last["fitness"], rel=1e-4)
    assert first["fitness"] == way["fitness"].iloc[0] != last["fitness"]  # it starts at the uniform choice


def _fitness(run: Run, search: str, tokens: int) -> float:
    """Fitness of a finished search's configuration on the fixed part of so many tokens."""
    problem = open_problem(run, SETTINGS, "searches.q")
    context = SearchContext(run, COMPUTE, name="again", resume=ResumeFolder(run.resume("again"), ""))
    text = search_text(run)
    evaluator = SearchEvaluator(context, problem, text, SETTINGS.minimizes(), lambda: None)
    levels = read_table(run.configuration(search), CONFIGURATION).set_index("unit")["level"]
    candidate = [[level.label for level in unit.levels].index(levels[unit.name]) for unit in problem.space.units]
    part = fixed_part(tokens, *text.shape)
    return evaluator.evaluate(np.array([candidate], dtype=np.int16), part)[0].fitness


def test_moves_lead_from_the_start_to_what_was_found(run: Run) -> None:
    run_search(StageContext(run, COMPUTE), "q", SETTINGS)
    trace, way = read_table(run.trace("q"), TRACE), read_table(run.progress("q"), PROGRESS)
    changed = trace[trace["accepted"] & (trace["candidate"] >= 0) & (trace["generation"] > 0)]["generation"]
    moved = way[way["raised"].map(len) > 0]
    assert moved["generation"].tolist() == changed.tolist() and len(moved) > 0
    level = dict.fromkeys(read_table(run.configuration("q"), CONFIGURATION)["unit"], 3)
    for row in moved.itertuples():  # a unit may go by more than one level at once, so only the way is known
        assert not set(row.raised) & set(row.lowered)
    touched = {unit for row in moved.itertuples() for unit in (*row.raised, *row.lowered)}
    found = read_table(run.configuration("q"), CONFIGURATION).set_index("unit")["level"].astype(int)
    assert {unit for unit in level if found[unit] != level[unit]} <= touched


def test_it_takes_few_tokens_and_changes_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    longer = MIXED.model_copy(update={"generations": 60})
    run_search(StageContext(run, COMPUTE), "q", longer)
    way, spent = read_table(run.progress("q"), PROGRESS), read_table(run.effort("q"), EFFORT)["tokens"].item()
    judged = way["part"].iloc[0] * (1 + way[way["candidate"] == "best"]["generation"].nunique())
    assert way["part"].iloc[0] > 12, "more than one sequence, or the share is not what limits it"
    assert judged <= 1.1 * progress.SHARE * spent
    monkeypatch.setattr("evopress.search.progress.judge_progress", lambda *_: [])
    run_search(StageContext(run, COMPUTE), "without", longer)
    for path in (run.configuration, run.trace):
        assert path("q").read_bytes() == path("without").read_bytes()


def test_of_many_changes_some_are_judged(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "MOST", 2)
    run_search(StageContext(run, COMPUTE), "q", SETTINGS)
    way = read_table(run.progress("q"), PROGRESS)
    best = way[way["candidate"] == "best"].drop_duplicates("generation")
    known = best[best["fitness"].notna()]
    assert len(best) > len(known) and known["generation"].iloc[0] == 0 and not np.isnan(way["fitness"].iloc[-1])


def test_a_strategy_whose_rounds_lead_to_the_budget_has_none(run: Run) -> None:
    torch.set_num_threads(1)
    settings = Greedy(variants="gptq", target=2.7, tokens=24, per_round=4, group_rule="none")
    run_search(StageContext(run, COMPUTE), "q", settings)
    assert read_table(run.progress("q"), PROGRESS).empty


@pytest.mark.parametrize(("tokens", "count"), [(0, 1), (25, 2), (1000, 6)])
def test_the_part_is_whole_sequences_from_all_over_the_text(tokens: int, count: int) -> None:
    part = fixed_part(tokens, 6, 12)
    assert part.lengths == (12,) * count and len(set(part.sequences)) == count
    assert part.sequences[0] == 0 and part.sequences[-1] == 6 - 6 // count
