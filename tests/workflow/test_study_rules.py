"""Studies through the workflow: run on the tiny model, asked what runs again, and every ready config planned."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from planning import REPOSITORY, Checkout
from test_incremental import EDIT, edited, replaced

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import read_table
from evopress.workflow.reference import rows
from studies.paths import candidates_path, comparison_path, convergence_path, pairs_path, sections_path
from studies.run import StudiedSettings
from studies.tables import COMPARISON, CONVERGENCE, MONOTONICITY_CANDIDATES, MONOTONICITY_PAIRS

TARGETS = ["comparison", "monotonicity", "convergence"]
REPORT = {"study_report", "report", "comparison", "monotonicity"}
CONVERGENCE_STUDY = {"study_convergence", "convergence"} | REPORT
DEPTH = {"study_monotonicity depth"} | REPORT
BITS = {"study_monotonicity bits"} | REPORT
CONFIGS = {
    "comparison-quantization": ("comparison", {"dp-table", "greedy", "random-seed2", "evolution-sensitivity-seed0"}),
    "comparison-sparsity": ("comparison", {"owl", "dp-propagated", "random-seed1", "evolution-seed2"}),
    "comparison-depth": ("comparison", {"cosine", "kl", "greedy", "evolution-blocks-seed1", "evolution-modules-seed0"}),
    "budgets-bits": ("comparison", {"half-dp-kl", "half-auto-quick-seed2", "quarter-paper-500k-seed0"}),
    "budgets-sparsity": ("comparison", {"sixty-uniform", "seventy-auto-standard-seed1"}),
    "budgets-depth": ("comparison", {"quarter-window", "two-fifths-auto-quick-seed0", "two-fifths-paper-500k-seed2"}),
    "mutation": ("mutation", {"drawn-seed0", "switches-1-seed0", "switches-7-seed2"}),
    "fitness": ("fitness", {"kl-seed0", "perplexity-seed2"}),
    "steps": ("steps", {"multi-step-seed0", "single-step-seed1"}),
    "monotonicity": ("monotonicity", set()),
    "convergence": ("convergence", set()),
    "peers": ("peers", {"evopress"}),
}
"""Config, its target, and some of the searches that it must run."""
CHANGES: list[tuple[str, Any, set[str]]] = [
    ("studies.convergence.units", [4], CONVERGENCE_STUDY),
    ("studies.convergence.kept", [0.3], CONVERGENCE_STUDY),
    ("studies.convergence.offspring", [1], CONVERGENCE_STUDY),
    ("studies.convergence.switches", [2], CONVERGENCE_STUDY),
    ("studies.convergence.runs", 1, CONVERGENCE_STUDY),
    ("studies.monotonicity.depth.variants", "others", {"variants_modules others"} | DEPTH),
    ("studies.monotonicity.depth.target", 2, DEPTH),
    ("studies.monotonicity.depth.fitness", "kl", DEPTH),
    ("studies.monotonicity.depth.candidates", 3, DEPTH),
    ("studies.monotonicity.depth.raises", 1, DEPTH),
    ("studies.monotonicity.depth.switches", 3, DEPTH),
    ("studies.monotonicity.depth.tokens", 96, DEPTH),
    ("studies.monotonicity.depth.pairs", 3, DEPTH),
    ("studies.monotonicity.depth.confirm_tokens", 288, DEPTH),
    ("studies.monotonicity.depth.least_t", 2.0, DEPTH),
    ("studies.monotonicity.depth.seed", 1, DEPTH),
    ("studies.monotonicity.depth", None, REPORT),
    ("studies.convergence", None, REPORT),
    ("variants.modules.exclude", ["*.0.mlp"], {"variants_modules modules"} | DEPTH),
]


@pytest.fixture(scope="module")
def study(settings: dict[str, Any]) -> dict[str, Any]:
    """The tiny run, its search twice, and studies."""
    pairs = {"candidates": 4, "raises": 2, "switches": 2, "tokens": 64, "pairs": 2, "confirm_tokens": 256}
    evo = {key: value for key, value in settings["searches"]["evo"].items() if key != "seed"}
    modules = {"method": "drop", "unit": "module"}
    return {
        **settings,
        "variants": {**settings["variants"], "modules": modules, "others": modules},
        "searches": {**settings["searches"], "twice": {**evo, "seeds": [0, 1]}},
        "studies": {
            "convergence": {"units": [4, 6], "kept": [0.5], "offspring": [1, 2], "switches": [1], "runs": 2},
            "monotonicity": {
                "bits": {"variants": "gptq", "target": 3.0, "fitness": "kl", **pairs},
                "depth": {"variants": "modules", "target": 1, **pairs},
            },
        },
    }


@pytest.fixture(scope="module")
def studied(finished: Checkout, study: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout in which the studies have ended."""
    checkout = Checkout(tmp_path_factory.mktemp("studied") / "evopress")
    shutil.copytree(finished.root, checkout.root)
    outcome = checkout.run(study, *TARGETS)
    assert outcome.returncode == 0, outcome.stderr
    for words in ("twice  ", "Monotonicity: depth", "Rank correlation", "Generations to the optimum"):
        assert words in outcome.stdout
    return checkout


def test_studies_leave_their_tables_and_are_in_the_report(studied: Checkout) -> None:
    run = Run(studied.root / "results/tiny")
    compared = read_table(comparison_path(run), COMPARISON).set_index(["search", "quantity"])
    assert compared.loc[("twice", "perplexity"), "n"].item() == 2
    assert compared.loc[("evo", "perplexity"), "n"].item() == 1
    # The seed that both have makes the same search of both.
    alone = compared.loc[("evo", "KL"), "mean"].item()
    mean, spread = compared.loc[("twice", "KL"), ["mean", "spread"]].tolist()
    assert abs(abs(alone - mean) * 2**0.5 - spread) < 1e-9
    assert len(read_table(convergence_path(run), CONVERGENCE)) == 2 * 2 * 2
    for name in ("bits", "depth"):
        candidates = read_table(candidates_path(run, name), MONOTONICITY_CANDIDATES)
        pairs = read_table(pairs_path(run, name), MONOTONICITY_PAIRS)
        assert (candidates["base"] >= 0).sum() > 0 and candidates["fitness"].notna().all()
        assert (pairs["sequences"] == 8).all()
    report = run.report.read_text()
    assert report.count("<svg") == 3 * 4 + 2 + 2 + 1  # two curves and two maps of each search, and figures of studies


def test_nothing_of_a_study_repeats_without_a_reason(studied: Checkout, study: dict[str, Any]) -> None:
    assert studied.plan(study, targets=TARGETS) <= set(TARGETS)


@pytest.mark.parametrize(("path", "value", "expected"), CHANGES, ids=[f"{path}={value}" for path, value, _ in CHANGES])
def test_a_setting_of_a_study_repeats_that_study_and_the_report(
    studied: Checkout, study: dict[str, Any], sources: Path, path: str, value: Any, expected: set[str]
) -> None:
    targets = TARGETS if path != "studies.convergence" else TARGETS[:2]
    assert studied.plan(replaced(study, path, value, sources), targets=targets) - {*TARGETS} == expected - {*TARGETS}


def test_every_setting_of_the_studies_is_in_the_table() -> None:
    wanted = {row.path for row in rows(StudiedSettings) if row.path.startswith("studies.")}
    wanted = {path for path in wanted if not path.startswith("studies.peers.")}  # test_peers_rules.py
    assert wanted == {path.replace(".depth.", ".<name>.") for path, value, _ in CHANGES if value is not None} & wanted


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("workflow/studies/convergence.py", {"study_convergence"}),
        ("workflow/studies/monotonicity.py", {"study_monotonicity bits", "study_monotonicity depth"}),
        ("workflow/studies/pairs.py", {"study_monotonicity bits", "study_monotonicity depth"}),
        ("workflow/studies/comparison.py", {"study_comparison"}),
        ("workflow/studies/plots.py", set()),
        ("workflow/studies/report.html.j2", set()),
    ],
)
def test_edited_code_of_a_study_repeats_it(
    studied: Checkout, study: dict[str, Any], name: str, expected: set[str]
) -> None:
    with edited(studied.root / name, EDIT):
        planned = studied.plan(study, targets=TARGETS) - {*TARGETS}
    assert planned == expected | {"study_report", "report"}


@pytest.mark.parametrize(
    ("path_of", "expected"),
    [
        (sections_path, {"study_report", "report"}),
        (convergence_path, {"study_convergence", "study_report", "report"}),
    ],
)
def test_what_a_failed_study_has_left_undone_is_missed(
    studied: Checkout, study: dict[str, Any], path_of: Callable[[Run], Path], expected: set[str]
) -> None:
    """Snakemake removes the outputs of a job that fails, while the report of the run before is still there."""
    path = path_of(Run(studied.root / "results/tiny"))
    aside = path.rename(path.with_suffix(".aside"))
    try:
        planned = studied.plan(study)
        assert {job for job in planned if not job.startswith("card ")} == expected  # no target above has made cards
    finally:
        aside.rename(path)


def test_a_target_without_its_settings_says_where_they_are(finished: Checkout, settings: dict[str, Any]) -> None:
    for target in ("convergence", "monotonicity"):
        outcome = finished.run(settings, target, "--dry-run")
        assert outcome.returncode == 1
        assert (
            f"studies.{target} names nothing to study; add --configfile config/studies/"
            in outcome.stdout + outcome.stderr
        )


def test_every_ready_study_is_planned_below() -> None:
    assert {path.stem for path in (REPOSITORY / "config/studies").glob("*.yaml")} == set(CONFIGS)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_ready_study_plans(tmp_path: Path, config: str) -> None:
    target, searches = CONFIGS[config]
    checkout = Checkout.make(tmp_path / "evopress")
    settings = yaml.safe_load((checkout.root / f"config/studies/{config}.yaml").read_text())
    planned = checkout.plan(settings, targets=[target])
    assert {f"search {name}" for name in searches} <= planned
    assert target in planned
    if config == "convergence":
        assert planned == {"convergence", "study_convergence"}
    elif config == "monotonicity":
        assert {"study_monotonicity quantization", "study_monotonicity depth", "report"} <= planned
    elif config == "peers":
        assert {"study_peer_file IQ2_XS", "study_peer Q4_0-Q4_0", "study_peer_search Q3_K_M", "report"} <= planned
    else:
        assert {"study_comparison", "report"} <= planned
    needs_hessians = not config.startswith(
        ("comparison-depth", "budgets-depth", "mutation", "fitness", "steps", "convergence")
    )
    assert ("hessians" in planned) == needs_hessians
