"""One tiny run, made for real once; the tests then ask what a change would make run again."""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_sources
from planning import Checkout
from tiny_run import TARGETS, Run, fault_settings, make_run
from zygote import Zygote


def _text(path: Path, seed: int) -> Path:
    letters = random.Random(seed)
    path.write_text("".join(letters.choice("abcdefgh") for _ in range(1500)))
    return path


def tiny_settings(folder: Path) -> dict[str, Any]:
    """Settings of a run on a tiny model and local text, so small that starting Python is most of the work."""
    text = {"source": "file", "column": "text", "tokens": 512, "sequence_length": 32, "seed": 0}
    evolution = {"generations": 2, "offspring": 4, "survivors": [1], "tokens": [64], "fitness": "kl", "top_k": 8}
    start = {"group_rule": "size", "initial_candidates": 2, "initial_tokens": 64, "seed": 0}
    return {
        "complete": True,
        "name": "tiny",
        "model": {"source": "folder", "path": str(folder / "model")},
        "data": {
            "calibration": {**text, "path": str(folder / "calibration.txt")},
            "search": {**text, "path": str(folder / "search.txt")},
            "evaluation": {"held": {**text, "path": str(folder / "held.txt")}},
        },
        "hessians": {"shards": 1},
        "variants": {"gptq": {"method": "gptq", "bits": [2, 3, 4], "group_size": 16}},
        "searches": {"evo": {"strategy": "evolution", "variants": "gptq", "target": 3.0, **evolution, **start}},
        "evaluation": {"tasks": {"names": ["everyday"], "include_path": "config/tasks", "limit": 4}},
    }


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a tiny model and three texts."""
    folder = tmp_path_factory.mktemp("sources")
    tiny_sources.folder(folder / "model")
    for seed, name in enumerate(["calibration", "search", "held"]):
        _text(folder / f"{name}.txt", seed)
    return folder


@pytest.fixture(scope="session")
def settings(sources: Path) -> dict[str, Any]:
    return tiny_settings(sources)


@pytest.fixture(scope="session")
def finished(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout in which the tiny run has ended."""
    checkout = Checkout.make(tmp_path_factory.mktemp("checkout") / "evopress")
    outcome = checkout.run(settings, "all", "archives")
    assert outcome.returncode == 0, outcome.stderr
    assert "evo" in outcome.stdout and "dense" in outcome.stdout
    return checkout


KILLS: list[str] = []
"""What was killed."""


@pytest.fixture
def dice(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers of this test; where it fails, its output names the seed that repeats them."""
    print(f"FAULT_SEED={os.environ['FAULT_SEED']}")
    return random.Random(f"{os.environ['FAULT_SEED']} {request.node.name}")


@pytest.fixture
def kills() -> list[str]:
    """Where tests write down what they have killed."""
    return KILLS


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Starts scripts at no cost."""
    zygote = Zygote(tmp_path_factory.mktemp("hub"))
    yield zygote
    zygote.close()


@pytest.fixture(scope="session")
def whole(settings: dict[str, Any], zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with a job of every kind, undisturbed; tests of faults spoil copies of it and compare them with it."""
    checkout = Checkout.make(tmp_path_factory.mktemp("whole") / "evopress")
    return make_run(checkout, fault_settings(settings), zygote, TARGETS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of this folder: they start Snakemake, or ask it what it would run."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("workflow")
