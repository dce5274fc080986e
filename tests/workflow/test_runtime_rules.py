"""GGUF files in llama.cpp as a stage of the workflow: run for real, and asked what runs again."""

from copy import deepcopy
from typing import Any

import pytest
from gguf_layouts import byte_level, folder_of, tiny
from planning import Checkout
from test_incremental import EDIT, edited, replaced

from evopress.artifacts.paths import Run
from evopress.evaluation import llama_cpp
from evopress.workflow.reference import rows
from evopress.workflow.settings import Settings

pytestmark = [
    pytest.mark.runtime,
    pytest.mark.skipif(not llama_cpp.is_installed(), reason="needs llama.cpp: pip install -e '.[runtime]'"),
]

TOLD = {"card evo gguf", "report"}
MEASURED = {"runtime evo", "runtime_dense"} | TOLD
BRIEF = {"tokens": 64, "prompt": 16, "generated": 2, "repetitions": 1}


@pytest.fixture(scope="module")
def measuring(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run whose model llama.cpp can run, with a GGUF export."""
    folder = tmp_path_factory.mktemp("model")
    small = tiny("llama", hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    changed = deepcopy(settings)
    changed["model"]["path"] = str(folder_of(small, folder / "model", byte_level()))
    exports = ["huggingface", {"exporter": "gguf", "dequantize": True}]
    changed["searches"] = {"evo": {"strategy": "uniform", "variants": "gptq", "target": 3, "exports": exports}}
    changed["evaluation"] = {"tasks": {"names": []}, "runtime": BRIEF}
    return changed


@pytest.fixture(scope="module")
def measured(measuring: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout in which that run has ended."""
    checkout = Checkout.make(tmp_path_factory.mktemp("runtime") / "evopress")
    without = replaced(measuring, "evaluation.runtime", False, checkout.root)
    assert not {job for job in checkout.plan(without) if "runtime" in job}
    assert checkout.plan(measuring) > MEASURED
    outcome = checkout.run(measuring, patience=1800)
    assert outcome.returncode == 0, outcome.stderr
    assert "GGUF files in llama.cpp" in outcome.stdout and "dense (F16)" in outcome.stdout
    return checkout


def test_card_and_report_tell_what_was_measured(measured: Checkout) -> None:
    run = Run(measured.root / "results/tiny")
    assert "## In llama.cpp" in run.card("evo", "gguf").read_text()
    assert "## In llama.cpp" not in run.card("evo", "huggingface").read_text()
    assert "<h2>In llama.cpp</h2>" in run.report.read_text()


# Of other settings, tests/workflow/test_incremental.py tells what depends on them.
CHANGES: list[tuple[str, Any, set[str]]] = [
    ("evaluation.runtime.tokens", 32, MEASURED),
    ("evaluation.runtime.largest_kl", 0.1, MEASURED),
    ("evaluation.runtime.prompt", 8, MEASURED),
    ("evaluation.runtime.generated", 3, MEASURED),
    ("evaluation.runtime.repetitions", 2, MEASURED),
    ("evaluation.runtime", True, MEASURED),
    ("evaluation.runtime", None, TOLD),
    ("evaluation.tasks.limit", 3, set()),  # of no task
    ("compute.threads", 2, set()),
    (
        "searches.evo.exports",
        [{"exporter": "gguf", "dequantize": True, "dense": "f32"}],
        {"export evo gguf", "runtime evo"} | TOLD,
    ),
]


@pytest.mark.parametrize(("path", "value", "expected"), CHANGES)
def test_a_file_is_measured_again_when_it_or_the_way_to_measure_changes(
    measured: Checkout, measuring: dict[str, Any], path: str, value: Any, expected: set[str]
) -> None:
    assert measured.plan(replaced(measuring, path, value, measured.root)) == expected


def test_every_setting_is_among_them() -> None:
    wanted = {row.path for row in rows(Settings) if row.path.startswith("evaluation.runtime.")}
    assert wanted and wanted <= {path for path, _, _ in CHANGES}


def test_nothing_changed_repeats_nothing(measured: Checkout, measuring: dict[str, Any]) -> None:
    assert measured.plan(measuring) == set()


@pytest.mark.parametrize("name", ["runtime.py", "llama_cpp.py", "llama_cpp_process.py"])
def test_edited_code_of_the_measurement_repeats_it_alone(
    measured: Checkout, measuring: dict[str, Any], name: str
) -> None:
    with edited(measured.root / "evopress/evaluation" / name, EDIT):
        assert measured.plan(measuring) == MEASURED
