"""Searches that start from what others have found: mapped to the space, brought to the budget, compared, accounted."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from search_run import COMPUTE, artifacts, fresh, prepare
from test_evolution import Linear, bit_strings, rng
from toy_search import first_state

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import CONFIGURATION, EFFORT, TRACE, read_table
from evopress.compression.methods.drop import Drop, make_module_table
from evopress.config.context import StageContext
from evopress.search.budget import brought_to_budget
from evopress.search.configuration import Configuration
from evopress.search.offered import Constraints
from evopress.search.problem import open_variants
from evopress.search.run import run_search
from evopress.search.strategies.dp import DynamicProgramming
from evopress.search.strategies.evolution import Evolution
from evopress.search.strategies.imported import Imported
from evopress.search.strategies.scores import without
from evopress.util.errors import ConfigError
from evopress.workflow.settings import Settings, lay_over, read_yaml

REPOSITORY = Path(__file__).parents[2]
EVOLUTION = Evolution(
    variants="gptq",
    target=2.7,
    group_rule="none",
    start_from=("dp",),
    initial_candidates=1,
    initial_tokens=72,
    generations=1,
    offspring=2,
    survivors=(1,),
    tokens=(72,),
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = prepare(tmp_path_factory.mktemp("earlier"))
    make_module_table(StageContext(run), "modules", Drop())
    make_module_table(StageContext(run), "blocks", Drop(unit="block"))
    make_module_table(StageContext(run), "late", Drop(exclude=("*.0.attn",)))
    return run


@pytest.fixture
def run(prepared: Run, tmp_path: Path) -> Run:
    return fresh(prepared, tmp_path / "run")


def test_a_configuration_is_the_same_candidate_again(run: Run) -> None:
    choices = open_variants(run, ["gptq"], Constraints("searches.x", 2.7))
    found = np.random.default_rng(5).integers(0, 2, len(choices.space.units)).astype(np.int16)
    assert Configuration.of_candidate(choices, found).nearest(choices.space).tolist() == found.tolist()


def test_levels_that_are_not_there_become_the_nearest(run: Run) -> None:
    choices = open_variants(run, ["gptq"], Constraints("searches.x", 2.7))
    table = Configuration.of_candidate(choices, choices.space.top).table
    table["value"] = 99.0
    table.loc[0, "value"] = 2.2
    candidate = Configuration(table).nearest(choices.space)
    assert candidate[0] == 0 and candidate[1:].tolist() == choices.space.top[1:].tolist()


def test_of_levels_with_the_same_value_the_one_of_the_same_name_is_taken(run: Run) -> None:
    """As GGUF types of the same size are."""
    choices = open_variants(run, ["gptq"], Constraints("searches.x", 2.7))
    unit = choices.space.units[0]
    alike = replace(unit, levels=tuple(replace(unit.levels[0], label=label) for label in ("IQ4_NL", "Q4_K", "Q4_0")))
    space = replace(choices.space, units=(alike, *choices.space.units[1:]))
    table = Configuration.of_candidate(choices, choices.space.top).table
    for number, label in enumerate(("IQ4_NL", "Q4_K", "Q4_0")):
        table.loc[0, ["value", "level"]] = alike.levels[0].value, label
        assert Configuration(table).nearest(space)[0] == number


def test_the_levels_of_another_search_are_taken_as_they_are(run: Run) -> None:
    context = StageContext(run, COMPUTE)
    run_search(context, "first", DynamicProgramming(variants="gptq", target=2.7))
    run_search(context, "again", Imported(variants="gptq", target=2.7, same_as="first"))
    first, again = (read_table(run.configuration(name), CONFIGURATION) for name in ("first", "again"))
    assert again.equals(first)
    with pytest.raises(
        ConfigError, match=r"searches\.less\.same_as: first: .* bits per weight above the target of 2\.1"
    ):
        run_search(context, "less", Imported(variants="gptq", target=2.1, same_as="first"))


def test_dropped_blocks_are_dropped_modules_and_the_reverse(run: Run) -> None:
    blocks = open_variants(run, ["blocks"], Constraints("searches.x", 1))
    modules = open_variants(run, ["modules"], Constraints("searches.x", 1, "size"))
    found = without(blocks.space, [1])
    as_modules = Configuration.of_candidate(blocks, found).nearest(modules.space)
    assert [unit.modules for unit, level in zip(modules.space.units, as_modules, strict=True) if not level] == [
        ((1, "attn"),),
        ((1, "mlp"),),
    ]
    assert modules.space.fits(as_modules)
    assert Configuration.of_candidate(modules, as_modules).nearest(blocks.space).tolist() == found.tolist()
    half = as_modules.copy()
    half[[unit.modules == ((1, "mlp"),) for unit in modules.space.units]] = 1
    assert Configuration.of_candidate(modules, half).nearest(blocks.space).tolist() == blocks.space.top.tolist()


def test_another_budget_is_met_exactly(run: Run) -> None:
    space = open_variants(run, ["gptq"], Constraints("searches.x", 2.7, "size")).space
    for candidate in (space.top, np.zeros_like(space.top)):
        fitting = brought_to_budget(candidate, space, rng())
        assert space.fits(fitting)
        steps = space.costs[:, 1] - space.costs[:, 0]
        for members, budget in zip(space.members, space.group_budgets, strict=True):
            raisable = members[fitting[members] < space.top[members]]
            assert budget - space.cost_of(fitting, members) < steps[raisable].min(initial=np.iinfo(np.int64).max)
    late = open_variants(run, ["late"], Constraints("searches.x", 1, "size")).space
    dropped = brought_to_budget(late.top, late, rng())
    assert sum(level == 0 for level in dropped) == 2  # one of each kind


def test_the_best_of_all_starts_is_taken() -> None:
    space, weights = bit_strings(20, 12), np.arange(20.0)
    best = np.array([1] * 12 + [0] * 8, dtype=np.int16)
    state, rows = first_state(space, 4, 16, Linear(weights), rng(), earlier=[best[::-1].copy(), best])
    assert state.parent.tolist() == best.tolist()
    assert {row.levels for row in rows} >= {tuple(best.tolist()), tuple(best[::-1].tolist())}


def test_effort_counts_what_a_start_has_taken(run: Run) -> None:
    run_search(
        StageContext(run, COMPUTE),
        "dp",
        DynamicProgramming(variants="gptq", target=2.7, errors="propagated", tokens=24),
    )
    run_search(StageContext(run, COMPUTE), "evo", EVOLUTION)
    trace, effort = (read_table(run.trace("evo"), TRACE), read_table(run.effort("evo"), EFFORT))
    before = read_table(run.effort("dp"), EFFORT)
    assert effort["tokens"][0] == trace["tokens"].sum() + before["tokens"][0]
    assert effort["seconds"][0] > before["seconds"][0] > 0


@pytest.mark.parametrize(("first", "then", "target"), [("gptq", "gptq", 2.7), ("blocks", "modules", 1.0)])
def test_a_search_goes_on_where_another_ended(run: Run, first: str, then: str, target: float) -> None:
    settings = EVOLUTION.model_copy(update={"target": target, "start_from": ()})
    run_search(StageContext(run, COMPUTE), "first", settings.model_copy(update={"variants": first, "generations": 4}))
    run_search(
        StageContext(run, COMPUTE), "then", settings.model_copy(update={"variants": then, "start_from": ("first",)})
    )
    ended, began = read_table(run.trace("first"), TRACE), read_table(run.trace("then"), TRACE)
    final = ended.loc[ended["accepted"], "fitness"].iloc[-1]  # every judgement is on the whole text
    # The uniform start misses the budget, and no random ones are drawn: one start is left, with nothing to compare to.
    assert (began["generation"] >= 1).all()
    parent = began[(began["generation"] == 1) & (began["candidate"] == -1)]
    assert parent["fitness"].item() == pytest.approx(final, rel=1e-5)


def test_a_search_killed_before_its_start_changed_does_not_go_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run_search(StageContext(run, COMPUTE), "dp", DynamicProgramming(variants="gptq", target=2.7))
    with monkeypatch.context() as patch:
        patch.setattr("evopress.search.run.write_table", _killed)
        with pytest.raises(KeyboardInterrupt):
            run_search(StageContext(run, COMPUTE), "evo", EVOLUTION)
    assert run.resume("evo").exists()
    run_search(StageContext(run, COMPUTE), "dp", DynamicProgramming(variants="gptq", target=2.3))
    run_search(StageContext(run, COMPUTE), "evo", EVOLUTION)
    kept = artifacts(run, "evo")
    run.configuration("evo").unlink()
    run_search(StageContext(run, COMPUTE), "evo", EVOLUTION)
    assert artifacts(run, "evo") == kept


def _killed(*_: object) -> None:
    raise KeyboardInterrupt


def _settings(**searches: object) -> Settings:
    base = read_yaml(REPOSITORY / "config/smollm2-3bit.yaml")
    extra = {"variants": {"modules": {"method": "drop"}}, "searches": searches}
    return Settings.load(lay_over(base, extra))


def test_searches_that_cannot_be_started_from_are_named() -> None:
    evolution = {"strategy": "evolution", "variants": "gptq", "target": 3.0}
    scores = {"strategy": "scores", "variants": "modules", "target": 7}
    for searches, message in [
        ({"evopress": {"start_from": ["unifrom"]}}, "searches.evopress.start_from: no search is named 'unifrom': did"),
        ({"evopress": {"start_from": ["evopress"]}}, "start_from: 'evopress' depends on this search itself"),
        (
            {"a": {**evolution, "start_from": ["b"]}, "b": {**evolution, "start_from": ["a"]}},
            "searches.a.start_from: 'b' depends on this search itself",
        ),
        (
            {"scores": scores, "evopress": {"start_from": ["scores"]}},
            "'scores' chooses from variants of another family ('modules')",
        ),
        (
            {"a": {**evolution, "seeds": [0, 1]}, "evopress": {"start_from": ["a"]}},
            "'a' stands for several searches; name one of a-seed0, a-seed1",
        ),
    ]:
        with pytest.raises(ConfigError, match=re.escape(message)):
            _settings(**searches)
    assert _settings(evopress={"start_from": ["uniform"]}).searches["evopress"].depends_on() == ("uniform",)
