"""The strategy `auto`: which search it stands for, and the start from scores that it takes for depth."""

from pathlib import Path
from typing import Any

import pytest
from search_run import COMPUTE, fresh, prepare
from test_config import load

from evopress.artifacts.tables import CONFIGURATION, EFFORT, TRACE, read_table
from evopress.compression.methods.drop import Drop, make_module_table
from evopress.config.context import StageContext
from evopress.search.run import run_search
from evopress.search.strategies.evolution import Evolution
from evopress.search.strategies.scores import BlockScores
from evopress.util.errors import ConfigError


def found(search: dict[str, Any], **overlay: Any) -> Evolution:
    made = load({"searches": {"mine": search}, **overlay}).searches["mine"]
    assert isinstance(made, Evolution)
    return made


def test_a_search_of_variants_and_target_alone_starts_from_measured_effects() -> None:
    made = found({"variants": "gptq", "target": 3})
    assert (made.start, made.group_rule, made.confidence, made.seed) == ("sensitivity", "none", 0.9, 0)
    assert made == found({"strategy": "auto", "effort": "quick", "variants": "gptq", "target": 3})


def test_more_effort_judges_more_and_no_step_asks_for_more_than_the_text_has() -> None:
    judged = {
        effort: found({"effort": effort, "variants": "gptq", "target": 3})
        for effort in ("quick", "standard", "thorough")
    }
    assert [made.generations * made.offspring for made in judged.values()] == [8, 112, 1920]
    assert [max(made.tokens) for made in judged.values()] == [2048, 4096, 4096]  # of which the text has 4,096
    assert judged["thorough"].initial_tokens == 4096
    text = {"source": "python_docs", "tokens": 98_304}
    assert max(found({"effort": "thorough", "variants": "gptq", "target": 3}, data={"search": text}).tokens) == 16384


def test_what_is_given_is_kept() -> None:
    made = found({"variants": "gptq", "target": 3, "fitness": "perplexity", "seed": 5, "levels": ["2", "4"]})
    assert (made.fitness, made.seed, made.levels) == ("perplexity", 5, ("2", "4"))
    searches = load({"searches": {"mine": {"variants": "gptq", "target": 3, "seeds": [1, 2]}}}).searches
    assert {name: getattr(search, "seed", None) for name, search in searches.items() if "mine" in name} == {
        "mine-seed1": 1,
        "mine-seed2": 2,
    }


def test_what_sparsegpt_has_pruned_is_polished_unless_told_otherwise() -> None:
    variants = {"sparse": {"method": "sparsegpt"}, "wanda": {"method": "wanda"}}
    sparse: dict[str, Any] = {"variants": "sparse", "target": 0.5}
    searches = {
        "left-out": sparse,
        "not-asked": {**sparse, "polish": "none"},
        "asked": {**sparse, "polish": "asymmetric"},
        "other-strategy": {**sparse, "strategy": "uniform"},
        "other-method": {**sparse, "variants": "wanda"},
        "several": {"variants": ["sparse", "gptq"], "target": {"fraction": 0.5}},
        "integers": {"variants": "gptq", "target": 3},
    }
    made = load({"searches": searches, "variants": variants}).searches
    polished = {"left-out": "sequential", "asked": "asymmetric"}
    assert {name: made[name].polish for name in searches} == {name: polished.get(name, "none") for name in searches}


@pytest.mark.parametrize(
    ("drop", "start"),
    [
        ({"unit": "module"}, "scores"),
        ({"unit": "block"}, "scores"),
        ({"unit": "pair"}, "sensitivity"),
        ({"exclude": ["*.mlp"]}, "sensitivity"),
    ],
)
def test_depth_starts_from_scores_and_lets_chance_spoil_nothing(drop: dict[str, Any], start: str) -> None:
    text = {"source": "python_docs", "tokens": 16384, "sequence_length": 512}
    depth = {"depth": {"method": "drop", **drop}}
    made = found({"variants": "depth", "target": 2}, variants=depth, data={"search": text})
    assert (made.start, made.confidence, made.tokens) == (start, 0.9, (256, 2048))
    assert (made.step_tokens, made.generations) == (128, 4)


def test_text_of_one_sequence_gives_no_confidence() -> None:
    text = {"source": "python_docs", "tokens": 2048, "sequence_length": 2048}
    q3: dict[str, Any] = {"mine": {"variants": "depth", "target": 2}, "q3": None}
    made = load({"searches": q3, "variants": {"depth": {"method": "drop"}}, "data": {"search": text}}).searches["mine"]
    assert isinstance(made, Evolution)
    assert (made.confidence, made.tokens) == (0, (256, 2048))
    asked = {"searches": {"mine": {**q3["mine"], "strategy": "evolution", "confidence": 0.9}, "q3": None}}
    with pytest.raises(ConfigError, match=r"searches\.mine\.confidence: differences are compared between sequences"):
        load({**asked, "variants": {"depth": {"method": "drop"}}, "data": {"search": text}})


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"variants": "gptq", "target": 3, "effort": "huge"}, "searches.mine.effort: "),
        ({"variants": "gptqq", "target": 3}, "searches.mine.variants: no variants are named 'gptqq'"),
        ({"variants": "gptq", "target": 1}, "searches.mine.target: "),
        (
            {"strategy": "evolution", "start": "scores", "variants": "gptq", "target": 3},
            "searches.mine.start: scores are of single blocks to drop, not of 'gptq'; choose `sensitivity`",
        ),
    ],
)
def test_bad_settings_are_named(search: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load({"searches": {"mine": search}})
    assert message in str(error.value)


def test_a_start_from_scores_is_what_they_would_find(tmp_path: Path) -> None:
    own = fresh(prepare(tmp_path / "made"), "own")
    make_module_table(StageContext(own), "depth", Drop())
    settings: dict[str, Any] = {"variants": "depth", "target": 1}
    evolution: dict[str, Any] = {**settings, "generations": 2, "offspring": 3, "survivors": (1,), "tokens": (24,)}
    for score in ("cosine", "window_cosine"):
        run_search(StageContext(own, COMPUTE), score, BlockScores(**settings, score=score, tokens=24))
    before = ("cosine", "window_cosine")
    for name, start in (("two-steps", {"start_from": before}), ("one-step", {"start": "scores"})):
        run_search(StageContext(own, COMPUTE), name, Evolution(**evolution, **start, initial_tokens=24))
    for path, schema in ((own.configuration, CONFIGURATION), (own.trace, TRACE)):
        one, two = (read_table(path(name), schema) for name in ("one-step", "two-steps"))
        assert one.equals(two)
    one, two = (read_table(own.effort(name), EFFORT)["tokens"][0] for name in ("one-step", "two-steps"))
    assert one == two > 24
