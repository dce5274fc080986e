"""Variants in a chain of jobs, and Hessians that are removed after use: run for real, and asked what runs again."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planning import Checkout
from test_incremental import EDIT, edited, replaced

from evopress.artifacts.paths import Run, manifest_path
from evopress.export.gguf.imatrix import imatrix_of, write_imatrix

CHAIN = {"variants_sequential chain", "search chained"}


@pytest.fixture
def copied(finished: Checkout, tmp_path: Path) -> Checkout:
    """A copy of the finished checkout, with Snakemake's records, that a test may change."""
    shutil.copytree(finished.root, tmp_path / "evopress")
    return Checkout(tmp_path / "evopress")


def results_of(checkout: Checkout) -> Run:
    return Run(checkout.root / "results/tiny")


def added(settings: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    """Settings with more variants and searches."""
    return {**settings, **{name: {**settings.get(name, {}), **more} for name, more in sections.items()}}


@pytest.fixture(scope="module")
def chained(settings: dict[str, Any]) -> dict[str, Any]:
    """With variants in a chain, and a search over them."""
    chain = {**settings["variants"]["gptq"], "propagation": "sequential", "propagation_level": "3"}
    search = {"strategy": "uniform", "variants": "chain", "target": 3.0}
    return added(settings, variants={"chain": chain}, searches={"chained": search})


def test_a_chain_runs_block_after_block_goes_on_after_a_kill_and_leaves_no_state(
    copied: Checkout, settings: dict[str, Any], chained: dict[str, Any], sources: Path
) -> None:
    run = results_of(copied)
    first, target, other = (
        path.relative_to(copied.root).as_posix()
        for path in (run.variant_table("chain", 0), run.configuration("chained"), run.configuration("evo"))
    )
    assert copied.plan(chained, targets=[target]) == CHAIN
    together = {**chained, "compute": {"blocks_per_job": 2}}
    jobs = {"variants_sequential_000 chain", "variants_sequential_002 chain", "search chained"}
    assert copied.plan(together, targets=[target]) == jobs
    outcome = copied.run(chained, first, "--notemp")  # what a kill in the second block leaves
    assert outcome.returncode == 0, outcome.stderr
    made = run.variant_table("chain", 0).stat().st_mtime_ns
    outcome = copied.run(chained, target)
    assert outcome.returncode == 0, outcome.stderr
    assert all(run.variant_table("chain", block).exists() for block in range(3))
    assert run.variant_table("chain", 0).stat().st_mtime_ns == made
    assert not any(run.chain_state("chain", block).exists() for block in range(3))

    assert copied.plan(chained, targets=[target]) == copied.plan(together, targets=[target]) == set()
    changes: list[tuple[str, Any, set[str]]] = [
        ("variants.chain.propagation_level", "2", CHAIN),
        ("searches.chained.target", 2, {"search chained"}),
        ("hessians.shards", 2, set()),
        ("data.calibration.seed", 1, {"tokens calibration"} | CHAIN),
    ]
    for path, value, expected in changes:
        assert copied.plan(replaced(chained, path, value, sources), targets=[target]) == expected, path
    dense = added(chained, variants={"chain": settings["variants"]["gptq"]})
    assert copied.plan(dense, targets=[target]) == {"variants chain", "search chained"}
    with edited(copied.root / "evopress/compression/sequential.py", EDIT):
        assert copied.plan(chained, targets=[target]) == CHAIN
        assert copied.plan(chained, targets=[other]) == set()


def test_blocks_share_jobs_and_which_of_them_do_repeats_nothing(copied: Checkout, settings: dict[str, Any]) -> None:
    run = results_of(copied)
    apart = added(settings, variants={"second": {**settings["variants"]["gptq"], "group_size": 8}})
    together = {**apart, "compute": {"blocks_per_job": 2}}
    tables = [run.variant_table("second", block) for block in range(3)]
    targets = [path.relative_to(copied.root).as_posix() for path in tables]
    assert copied.plan(together, targets=targets) == {"variants_000 second", "variants_002 second"}
    outcome = copied.run(together, *targets)
    assert outcome.returncode == 0, outcome.stderr
    assert not run.made_table("second", 0).parent.exists()
    for same in (together, apart, {**apart, "compute": {"blocks_per_job": 3}}):
        assert copied.plan(same, targets=targets) == set()
    tables[1].unlink()
    assert copied.plan(together, targets=targets) == {"variants_000 second"}
    assert copied.plan(apart, targets=targets) == {"variants second"}


def test_hessians_go_when_the_last_that_needs_them_has_ended(copied: Checkout, settings: dict[str, Any]) -> None:
    run = results_of(copied)
    second = {**settings["variants"]["gptq"], "group_size": 8}
    removing = added({**settings, "hessians": {"keep": False}}, variants={"second": second})
    hessians = [run.hessian(block) for block in range(3)]
    assert all(path.exists() for path in hessians)
    assert copied.plan(removing) == set()
    outcome = copied.run(
        removing, *(run.variant_table("second", block).relative_to(copied.root).as_posix() for block in range(3))
    )
    assert outcome.returncode == 0, outcome.stderr
    assert not any(path.exists() or manifest_path(path).exists() for path in hessians)

    assert copied.plan(removing) == set()
    assert copied.plan(settings) == set()
    third = {"strategy": "uniform", "variants": "third", "target": 3.0}
    wider = added(removing, variants={"third": {**second, "bits": [2, 3]}}, searches={"third": third})
    assert {job for job in copied.plan(wider) if job.startswith(("hessians", "variants", "search"))} == {
        "hessians",
        "variants third",
        "search third",
    }
    recalibrated = copied.plan({**wider, "hessians": {"keep": False, "shards": 2}})
    assert {"hessians", "variants gptq", "variants third", "search evo"} <= recalibrated
    more = {**removing, "variants": {"gptq": {**settings["variants"]["gptq"], "bits": [2, 3, 4, 5]}}}
    again = copied.plan(more)
    assert {"hessians", "variants gptq", "search evo"} <= again
    assert not again & {
        "tokens calibration",
        "tokens search",
        "tokens held",
        "model",
        "perplexity_dense",
        "tasks_dense",
    }
    search = {**removing, "searches": {"evo": {**settings["searches"]["evo"], "generations": 3}}}
    assert not copied.plan(search) & {"hessians", "variants gptq"}


def test_an_imatrix_takes_the_place_of_hessians_and_other_content_makes_variants_anew(
    copied: Checkout, settings: dict[str, Any], sources: Path
) -> None:
    method = {
        "method": "gguf",
        "types": ["Q4_0", "Q8_0"],
        "rounding": "rtn",
        "exclude": ["*.down_proj"],
        "embedding": False,
    }
    path = copied.root / "own.dat"
    imatrix = imatrix_of(results_of(copied))
    write_imatrix(imatrix, path, "dat")
    search = {"strategy": "dp", "variants": "given", "target": 5.0}
    wanted = added(settings, variants={"given": {**method, "imatrix": "own.dat"}}, searches={"rounded": search})
    target = results_of(copied).configuration("rounded").relative_to(copied.root).as_posix()
    assert copied.plan(wanted, targets=[target]) == {"variants given", "search rounded"}
    recalibrated = replaced(wanted, "hessians.shards", 2, sources)
    assert copied.plan(recalibrated, targets=[target]) == {"variants given", "search rounded"}
    outcome = copied.run(wanted, target)
    assert outcome.returncode == 0, outcome.stderr
    assert copied.plan(wanted, targets=[target]) == set()
    doubled = {name: 2 * sums for name, sums in imatrix.sums.items()}
    write_imatrix(replace(imatrix, sums=doubled), path, "dat")
    assert copied.plan(wanted, targets=[target]) == {"variants given", "search rounded"}
    path.unlink()
    outcome = copied.run(wanted, target, "--dry-run")
    assert outcome.returncode == 1
    assert "variants.given.imatrix: 'own.dat' is not there; check the path" in outcome.stdout + outcome.stderr
