"""Bad input through the real command: a clear line, a non-zero exit, and nothing half written."""

import os
import shutil
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import impatient
import pytest
import yaml
from planning import Checkout


@pytest.fixture
def fresh(tmp_path: Path) -> Checkout:
    return Checkout.make(tmp_path / "evopress")


@pytest.fixture
def copied(finished: Checkout, tmp_path: Path) -> Checkout:
    """A copy of the finished checkout, with Snakemake's records, that a test may spoil."""
    shutil.copytree(finished.root, tmp_path / "evopress")
    return Checkout(tmp_path / "evopress")


def with_(settings: dict[str, Any], *path: str, value: Any) -> dict[str, Any]:
    changed = deepcopy(settings)
    place = changed
    for section in path[:-1]:
        place = place[section]
    place[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("nam",), "x", "settings: unknown key 'nam': did you mean 'name'?"),
        (("searches", "evo", "target"), 1.5, "searches.evo.target: 1.5 bits is below the lowest level (2)"),
        (("searches", "evo", "variants"), "gptg", "searches.evo.variants: no variants are named 'gptg'"),
        (("variants", "gptq"), {"method": "sparsegpt", "sparsity": 1}, "variants.gptq.sparsity: Input should be less"),
        (("variants", "gptq"), {"method": "wanda", "sparsity": 0}, "variants.gptq.sparsity: Input should be greater"),
        (("name",), "../elsewhere", "name: '../elsewhere' cannot name a file"),
        (("name",), "a;touch b", "name: 'a;touch b' cannot name a file"),
        (("model", "path"), "/no/such/folder", "/no/such/folder"),
        (("data", "search", "path"), "/no/such/text.txt", "/no/such/text.txt: is no file"),
        (
            ("evaluation", "tasks", "include_path"),
            "no/tasks",
            "evaluation.tasks.include_path: 'no/tasks' is not a folder",
        ),
        (("evaluation", "runtime"), True, "evaluation.runtime: no search exports a GGUF file"),
        (("evaluation", "tasks", "names"), ["evryday"], "unknown task 'evryday': did you mean 'everyday'?"),
        (
            ("variants", "gptq", "group_size"),
            7,
            "variants.gptq: model.layers.0.self_attn.q_proj: group_size 7 does not divide the 32 input features",
        ),
        (
            ("variants", "gptq", "exclude"),
            ["*.ffn"],
            "variants.gptq.exclude: '*.ffn' matches no layer; names look like",
        ),
        (("data", "search", "tokens"), 4096, "data.search: "),
        (
            ("data", "evaluation", "Search"),
            {"source": "python_docs", "tokens": 512, "sequence_length": 32},
            "data.evaluation.Search: differs from 'search' in case alone",
        ),
    ],
)
def test_wrong_settings_end_before_anything_runs(
    fresh: Checkout, settings: dict[str, Any], path: tuple[str, ...], value: Any, message: str
) -> None:
    outcome = fresh.run(with_(settings, *path, value=value), "--dry-run")
    assert outcome.returncode == 1
    assert message in outcome.stdout + outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert not (fresh.root / "results").exists()


def test_a_failing_job_has_the_last_word_and_leaves_no_artifact(copied: Checkout, settings: dict[str, Any]) -> None:
    too_little = with_(settings, "searches", "evo", "seed", value=1) | {"compute": {"memory_gb": 1e-6}}
    outcome = copied.run(too_little)
    assert outcome.returncode == 1
    assert "Traceback" not in outcome.stderr
    last = outcome.stderr.rstrip().splitlines()[-1]
    assert last.startswith("compute.memory_gb") and "error" not in last
    (inputs,) = (line for line in outcome.stderr.splitlines() if line.startswith("    input: "))
    assert "results/tiny/tokens/search.parquet" in inputs and ".py" not in inputs
    assert not (copied.root / "results/tiny/search/evo/configuration.parquet").exists()


def test_ctrl_c_ends_a_run_in_one_line(copied: Checkout, settings: dict[str, Any]) -> None:
    """As a terminal sends it: to Snakemake and its jobs alike, once the job has begun to log.

    Before that Python itself is starting, and its own traceback cannot be kept away.
    """
    (copied.root / "settings.yaml").write_text(yaml.safe_dump(with_(settings, "searches", "evo", "seed", value=1)))
    command = [sys.executable, impatient.__file__, "--cores", "2", "--configfile", "settings.yaml"]
    environment = os.environ | {"PYTHONPATH": str(copied.root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (copied.root / "said.txt").open("w") as said:
        run = subprocess.Popen(
            command, cwd=copied.root, env=environment, stdout=said, stderr=said, start_new_session=True
        )
    deadline = time.monotonic() + 600
    log = copied.root / "results/tiny/logs/search/evo.log"
    log.unlink()  # of the run that this one is a copy of
    while not log.exists():
        assert run.poll() is None and time.monotonic() < deadline, (copied.root / "said.txt").read_text()
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait(timeout=600) != 0
    text = (copied.root / "said.txt").read_text()
    assert text.rstrip().splitlines()[-1] == "interrupted: the same command goes on from here"
    assert "Traceback" not in text and "Error" not in text
    assert copied.plan(settings) is not None  # nothing is locked


def test_results_of_other_settings_are_refused_where_snakemake_does_not_know_them(
    finished: Checkout, fresh: Checkout, settings: dict[str, Any]
) -> None:
    shutil.copytree(finished.root / "results", fresh.root / "results")
    before = {path: path.stat().st_mtime_ns for path in fresh.root.joinpath("results").rglob("*")}
    outcome = fresh.run(with_(settings, "searches", "evo", "generations", value=7))
    assert outcome.returncode == 1
    assert "search/evo/configuration.parquet: was made by other settings (generations: 2, now 7)" in outcome.stderr
    assert "Choose another `name`" in outcome.stderr
    assert before == {path: path.stat().st_mtime_ns for path in fresh.root.joinpath("results").rglob("*")}


def test_results_of_the_same_settings_are_no_error(
    finished: Checkout, fresh: Checkout, settings: dict[str, Any]
) -> None:
    shutil.copytree(finished.root / "results", fresh.root / "results")
    fresh.plan(settings)  # what it repeats depends on the times of the copied files


def test_other_settings_are_no_error_where_snakemake_knows_what_made_the_results(
    copied: Checkout, settings: dict[str, Any]
) -> None:
    assert "search evo" in copied.plan(with_(settings, "searches", "evo", "generations", value=7))
