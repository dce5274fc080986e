"""Paths full of shell characters through the real commands: quoted everywhere, and run by no shell."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from planning import Checkout

NAME = "a'b\"c $(touch pwned) `touch pwned`;touch pwned&|x ü* #-\\ [y] < > %s ?!"


@pytest.fixture
def fresh(tmp_path: Path) -> Checkout:
    return Checkout.make(tmp_path / "evopress")


def moved(settings: dict[str, Any], sources: Path, folder: Path) -> dict[str, Any]:
    """Settings whose model and texts lie in a folder of a hostile name."""
    shutil.copytree(sources, folder)
    return json.loads(json.dumps(settings).replace(json.dumps(str(sources))[1:-1], json.dumps(str(folder))[1:-1]))


def test_hostile_paths_are_arguments_and_nothing_else(
    fresh: Checkout, settings: dict[str, Any], sources: Path, tmp_path: Path
) -> None:
    hostile = moved(settings, sources, tmp_path / NAME)
    outcome = fresh.run(hostile, "results/tiny/tokens/held.parquet", "--printshellcmds")
    assert outcome.returncode == 0, outcome.stderr
    commands = re.findall(r"Shell command: (.*)", outcome.stderr)
    asked = [json.loads(words[words.index("--settings") + 1]) for words in map(shlex.split, commands)]
    assert sorted(Path(values["path"]).name for values in asked) == ["held.txt", "model"]
    assert all(Path(values["path"]).parent == tmp_path / NAME for values in asked)
    assert not list(tmp_path.rglob("pwned*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([NAME, "evopress"])
    assert sorted(path.name for path in (fresh.root / "results").iterdir()) == ["tiny"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a{block}", "Snakemake cannot take '{' in a path literally"),
        ("a<results>", "Snakemake cannot take '<results>' in a path literally"),
        ("a\nb", r"Snakemake cannot take '\n' in a path literally"),
    ],
)
def test_paths_that_are_patterns_end_before_anything_runs(
    fresh: Checkout, settings: dict[str, Any], sources: Path, tmp_path: Path, name: str, message: str
) -> None:
    outcome = fresh.run(moved(settings, sources, tmp_path / name), "--dry-run")
    assert outcome.returncode == 1
    assert message in outcome.stdout + outcome.stderr
    assert "Traceback" not in outcome.stdout + outcome.stderr
    assert not (fresh.root / "results").exists()


@pytest.mark.parametrize("value", ["a\0b", "\ud800"])
def test_texts_that_no_path_can_hold_end_before_anything_runs(
    fresh: Checkout, settings: dict[str, Any], value: str
) -> None:
    outcome = fresh.run({**settings, "model": {"source": "folder", "path": value}}, "--dry-run")
    assert outcome.returncode == 1
    told = outcome.stdout + outcome.stderr
    assert "model.path" in told and "holds a character that no path or text can have" in told
    assert "Traceback" not in told
