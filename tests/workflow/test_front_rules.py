"""A front through all stages: sizes share single effects, and a size that is added repeats nothing of the others."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import pytest
from planning import Checkout

SIZES = ["37 kB", "40 kB"]
EVOLUTION = {"generations": 1, "offspring": 3, "survivors": [1], "tokens": [64], "initial_tokens": 64}


def with_front(settings: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """The tiny run with a front in place of its search."""
    asked = {"strategy": "front", "variants": "gptq", "sizes": SIZES, "sensitivity_tokens": 32, "final_tokens": 128}
    searches = {"front": {**asked, **EVOLUTION, **changes}}
    return {**deepcopy(dict(settings)), "searches": searches, "evaluation": {"tasks": {"names": []}}}


def jobs_of(size: str) -> set[str]:
    """All that is made of one point."""
    name = f"front-{size}"
    kinds = ("search {}", "export {} huggingface", "card {} huggingface", "perplexity {}")
    return {kind.format(name) for kind in kinds}


@pytest.fixture(scope="module")
def fronted(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout in which a front of two sizes has ended."""
    checkout = Checkout.make(tmp_path_factory.mktemp("front") / "evopress")
    outcome = checkout.run(with_front(settings), "all", patience=1800.0)
    assert outcome.returncode == 0, outcome.stderr
    return checkout


def effects_of(jobs: set[str]) -> set[str]:
    return {job for job in jobs if job.startswith("effects ")}


def test_both_sizes_rest_on_one_set_of_effects(fronted: Checkout, settings: dict[str, Any]) -> None:
    folders = list((fronted.root / "results/tiny/effects").iterdir())
    assert len(folders) == 1 and folders[0].name.startswith("gptq-")
    assert fronted.plan(with_front(settings)) == set()


@pytest.mark.parametrize("sizes", [["37 kB", "38 kB", "40 kB"], ["36 kB", *SIZES], [*SIZES, "41 kB"]])
def test_a_size_that_is_added_is_all_that_runs(fronted: Checkout, settings: dict[str, Any], sizes: list[str]) -> None:
    (added,) = {size.replace(" kB", "kb") for size in sizes if size not in SIZES}
    assert fronted.plan(with_front(settings, sizes=sizes)) == jobs_of(added) | {"report"}


def test_a_size_that_is_removed_repeats_the_report(fronted: Checkout, settings: dict[str, Any]) -> None:
    assert fronted.plan(with_front(settings, sizes=SIZES[:1])) == {"report"}


@pytest.mark.parametrize(
    "changes", [{"generations": 2}, {"offspring": 4}, {"tokens": [128]}, {"seed": 1}, {"final_tokens": 64}], ids=str
)
def test_other_settings_of_the_search_measure_no_effects(
    fronted: Checkout, settings: dict[str, Any], changes: dict[str, Any]
) -> None:
    expected = jobs_of("37kb") | jobs_of("40kb") | {"report"}
    assert fronted.plan(with_front(settings, **changes)) == expected


def test_another_search_of_the_same_effects_measures_none(fronted: Checkout, settings: dict[str, Any]) -> None:
    more = with_front(settings)
    evolution = {**EVOLUTION, "strategy": "evolution", "variants": "gptq", "target": 3.0, "start": "sensitivity"}
    more["searches"]["more"] = {**evolution, "sensitivity_tokens": 32}
    assert not effects_of(fronted.plan(more))
    more["searches"]["more"]["sensitivity_tokens"] = 64
    assert len(effects_of(fronted.plan(more))) == 1


def test_other_effects_repeat_all_sizes(fronted: Checkout, settings: dict[str, Any]) -> None:
    jobs = fronted.plan(with_front(settings, sensitivity_tokens=64))
    assert len(effects_of(jobs)) == 1
    assert jobs - effects_of(jobs) == jobs_of("37kb") | jobs_of("40kb") | {"report"}


def test_the_report_and_the_summary_show_the_front(fronted: Checkout) -> None:
    results = fronted.root / "results/tiny"
    summary, report = (results / "summary.txt").read_text(), (results / "report.html").read_text()
    assert "Front front" in summary and "Front front" in report
