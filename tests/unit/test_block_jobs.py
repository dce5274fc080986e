"""How many blocks' variants one job makes."""

from typing import Any

import pytest
from test_config import BASE, load

from evopress.workflow.jobs import blocks_per_job, is_small, minutes
from evopress.workflow.settings import Settings

FOLDER = {"source": "folder", "path": "m"}
HUB = {"source": "hub", "id": "a/b"}


def settings(model: dict[str, Any], asked: int | None = None) -> Settings:
    return load({**BASE, "model": model, "compute": {"blocks_per_job": asked}})


@pytest.mark.parametrize(
    ("model", "hidden_size", "blocks", "expected"),
    [
        (FOLDER, 576, 30, 4),  # 135M: eight jobs
        (FOLDER, 896, 24, 3),
        (FOLDER, 2048, 16, 1),  # 1B
        (FOLDER, 1536, 28, 2),
        (FOLDER, 16384, 126, 1),  # 405B
        (FOLDER, 0, 30, 1),  # the config does not tell
        (FOLDER, 32, 3, 1),
        (HUB | {"blocks": 30}, 576, 30, 1),  # once the model is there; before, the config does not tell
        (HUB, 576, 30, 4),
    ],
)
def test_small_models_have_few_jobs(model: dict[str, Any], hidden_size: int, blocks: int, expected: int) -> None:
    assert blocks_per_job(settings(model), hidden_size, blocks) == expected
    assert minutes(settings(model), hidden_size, blocks, 2) == 120


def test_a_wheel_has_as_many_before_its_config_is_there() -> None:
    wheel = {"source": "pypi", "package": "p", "version": "1", "sha256": "0" * 64, "file": "f.gguf", "blocks": 30}
    assert blocks_per_job(settings(wheel), 0, 30) == blocks_per_job(settings(wheel), 576, 30) == 4


def test_what_is_asked_for_is_done_and_has_the_time_it_takes() -> None:
    assert blocks_per_job(settings(FOLDER, 8), 4096, 32) == 8
    assert minutes(settings(FOLDER, 8), 4096, 32, 1) == 8 * 60
    assert minutes(settings(FOLDER, 4), 576, 30, 1) == 60
    assert blocks_per_job(settings(FOLDER, 1000), 4096, 32) == 32
    assert minutes(settings(FOLDER, 1000), 4096, 32, 1) == 32 * 60


def test_what_is_asked_for_makes_no_model_small() -> None:
    assert is_small(settings(FOLDER, 1), 576) and not is_small(settings(FOLDER, 8), 4096)
    assert not is_small(settings(FOLDER), 0)
