"""A text configuration as a search of the workflow: exported, imported, run, and run again when its file changes."""

import shutil
import subprocess
import sys
from typing import Any

import pytest
import yaml
from planning import Checkout

IMPORTED = {
    "search mine",
    "export mine huggingface",
    "card mine huggingface",
    "perplexity mine",
    "tasks mine",
    "report",
}


def evopress(checkout: Checkout, *arguments: str) -> str:
    command = [sys.executable, "-m", "evopress", *arguments]
    done = subprocess.run(command, cwd=checkout.root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def imported(
    finished: Checkout, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checkout, dict[str, Any]]:
    """A finished checkout whose configuration was exported and imported as another search."""
    root = tmp_path_factory.mktemp("imported") / "evopress"
    shutil.copytree(finished.root, root)
    checkout = Checkout(root)
    (root / "base.yaml").write_text(yaml.safe_dump(settings))
    evopress(checkout, "export-config", "results/tiny", "evo", "--output", "evo.txt")
    printed = evopress(checkout, "import-config", "evo.txt", "mine", "base.yaml", "--variants", "gptq", "--target", "3")
    both = {**settings, "searches": {**settings["searches"], **yaml.safe_load(printed)["searches"]}}
    assert checkout.plan(both) == IMPORTED
    outcome = checkout.run(both)
    assert outcome.returncode == 0, outcome.stderr
    return checkout, both


def test_what_was_exported_comes_back(imported: tuple[Checkout, dict[str, Any]]) -> None:
    checkout, _ = imported
    again = evopress(checkout, "export-config", "results/tiny", "mine")
    assert again == (checkout.root / "evo.txt").read_text() and again.count("\n") > 6


def test_it_runs_again_when_its_file_says_something_else(imported: tuple[Checkout, dict[str, Any]]) -> None:
    checkout, settings = imported
    path = checkout.root / "evo.txt"
    before = path.read_text()
    assert checkout.plan(settings) == set()
    path.write_text(before.replace(": 4\n", ": 2\n"))
    assert checkout.plan(settings) == IMPORTED
    path.write_text(before)
    assert checkout.plan(settings) == set()


def test_a_file_that_is_not_there_ends_before_anything_runs(imported: tuple[Checkout, dict[str, Any]]) -> None:
    checkout, settings = imported
    mine = {**settings["searches"]["mine"], "file": "none.txt"}
    outcome = checkout.run({**settings, "searches": {**settings["searches"], "mine": mine}}, "--dry-run")
    assert outcome.returncode == 1
    assert "searches.mine.file: 'none.txt' is not there" in outcome.stdout + outcome.stderr
