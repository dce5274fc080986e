"""Which jobs run again after a change: every setting, every module of the package, touched and edited files."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from planning import Checkout

from evopress.search.base import EffectsSettings
from evopress.workflow.reference import rows
from evopress.workflow.settings import Settings

REPORT = {"report"}
TASKS = {"tasks evo", "tasks_dense"} | REPORT
STITCH = {"export evo huggingface", "card evo huggingface", "perplexity evo", "tasks evo"} | REPORT
SEARCH = {"search evo"} | STITCH
VARIANTS = {"variants gptq"} | SEARCH
HESSIANS = {"hessians"} | VARIANTS
CALIBRATION = {"tokens calibration"} | HESSIANS
TOKENS = {"tokens calibration", "tokens search", "tokens held"}
SEARCH_TEXT = {"tokens search"} | SEARCH
HELD_OUT = {"tokens held", "perplexity_dense", "perplexity evo", "card evo huggingface"} | REPORT
MODEL = {"model"} | CALIBRATION | SEARCH_TEXT | HELD_OUT | TASKS
CHAIN = {"variants_sequential gptq"} | SEARCH
OTHER_SEARCH = {job.replace("evo", "other") for job in SEARCH - REPORT} | REPORT
EFFECTS = EffectsSettings(variants="gptq", tokens=512).name
SEEDS = {job.replace("evo", f"evo-seed{seed}") for job in SEARCH - REPORT for seed in (0, 1)}
SEEDS |= {"study_comparison", "study_report"} | REPORT

# Setting, another value, and what must run again. A setting of a kind that the run does not have is changed together
# with the kind; its own part in the slice is checked in tests/unit/test_config.py.
TEXT_CHANGES: list[tuple[str, Any]] = [
    ("tokens", 256),
    ("sequence_length", 16),
    ("seed", 1),
    ("path", "{sources}/other.txt"),
    ("column", "body"),
    ("messages", True),
    ("bos", "document"),
    ("source", "python_docs"),
]
CHANGES: list[tuple[str, Any, set[str]]] = [
    ("complete", True, set()),
    ("model.source", "gguf", MODEL),
    ("model.path", "{sources}/copy", MODEL),
    ("model.dtype", "bfloat16", MODEL),
    ("model.trust_remote_code", True, MODEL),
    ("model.blocks", 3, set()),
    ("model.blocks", 2, MODEL),
    *((f"data.calibration.{key}", value, CALIBRATION) for key, value in TEXT_CHANGES),
    *((f"data.search.{key}", value, SEARCH_TEXT) for key, value in TEXT_CHANGES),
    *((f"data.evaluation.held.{key}", value, HELD_OUT) for key, value in TEXT_CHANGES),
    ("data.evaluation.more", {"source": "python_docs"}, HELD_OUT - {"tokens held"} | {"tokens more"}),
    ("hessians.shards", 2, {"hessian_sum"} | HESSIANS),
    ("hessians.keep", False, set()),
    ("variants.gptq.method", "gptq", set()),
    ("variants.gptq.bits", [2, 3, 4, 5], VARIANTS),
    ("variants.gptq.group_size", 8, VARIANTS),
    ("variants.gptq.symmetric", True, VARIANTS),
    ("variants.gptq.scale_dtype", "bfloat16", VARIANTS),
    ("variants.gptq.embedding", True, {"variants_embedding gptq"} | VARIANTS),
    ("variants.gptq.activation_order", False, VARIANTS),
    ("variants.gptq.clip_search", False, VARIANTS),
    ("variants.gptq.damping", 0.02, VARIANTS),
    ("variants.gptq.block_size", 16, VARIANTS),
    ("variants.gptq.passes", 1, VARIANTS),
    ("variants.gptq.exclude", ["*.down_proj"], VARIANTS),
    ("variants.gptq.propagation", "sequential", CHAIN),
    ("variants.gptq.propagation_level", "3", CHAIN),
    ("variants.unused", {"method": "gptq", "bits": [2, 3], "group_size": 8}, set()),
    ("searches.evo.strategy", "uniform", SEARCH),
    ("searches.evo.target", 2.5, SEARCH),
    ("searches.evo.target", {"bytes": "90 kB"}, SEARCH),
    ("searches.evo.target", {"fraction": 0.3}, SEARCH),
    ("searches.evo.target", {"bpw": 4, "above_source": True}, SEARCH),
    ("searches.evo.tied", [["q_proj", "k_proj", "v_proj"]], SEARCH),
    ("searches.evo.levels", ["2", "4"], SEARCH),
    ("searches.evo.generations", 3, SEARCH),
    ("searches.evo.offspring", 5, SEARCH),
    ("searches.evo.survivors", [2, 1], SEARCH),
    ("searches.evo.tokens", [128], SEARCH),
    ("searches.evo.fitness", "perplexity", SEARCH),
    ("searches.evo.top_k", 9, SEARCH),
    ("searches.evo.group_rule", "none", SEARCH),
    ("searches.evo.initial_candidates", 3, SEARCH),
    ("searches.evo.confidence", 0.9, SEARCH),
    ("searches.evo.initial_tokens", 32, SEARCH),
    ("searches.evo.start", "sensitivity", {f"effects {EFFECTS}"} | SEARCH),
    ("searches.evo.start_from", ["other"], OTHER_SEARCH | SEARCH),
    ("searches.evo.sensitivity_tokens", 32, SEARCH),
    ("searches.evo.sensitivity_levels", 2, SEARCH),
    ("searches.evo.population", 2, SEARCH),
    ("searches.evo.switches", 3, SEARCH),
    ("searches.evo.step_tokens", 32, SEARCH),
    ("searches.evo.seed", 1, SEARCH),
    ("searches.evo.polish", "sequential", {"polish evo"} | STITCH),
    ("searches.evo.exports", ["huggingface", "archive"], REPORT),  # the archive is there already
    ("searches.evo.seeds", [0, 1], SEEDS),
    ("searches.evo.variants", "second", {"variants second"} | SEARCH),
    ("searches.other", {"strategy": "uniform", "variants": "gptq", "target": 3}, OTHER_SEARCH),
    ("evaluation.tasks.names", [], REPORT),
    ("evaluation.tasks.include_path", "config", TASKS),  # which holds the folder of before
    ("evaluation.tasks.num_fewshot", 1, TASKS),
    ("evaluation.tasks.limit", 5, TASKS),
    ("evaluation.tasks.batch_size", 4, TASKS),
    ("evaluation.tasks.run_generated_code", True, TASKS),
    ("card.quantized_by", "someone", {"card evo huggingface"}),
    ("compute.device", "cpu", set()),
    ("compute.memory_gb", 2.0, set()),
    ("compute.processes", 2, set()),
    ("compute.threads", 1, set()),
    ("compute.blocks_per_job", 2, set()),
    ("compute.container", "docker://python:3.12", set()),
]
# What must change with a setting to keep the settings valid.
ALSO: dict[tuple[str, Any], dict[str, Any]] = {
    ("model.source", "gguf"): {"model": {"source": "gguf", "path": "{sources}/model.gguf", "blocks": 3}},
    ("variants.gptq.propagation", "sequential"): {"variants.gptq.propagation_level": "2"},
    ("variants.gptq.propagation_level", "3"): {"variants.gptq.propagation": "sequential"},
    ("searches.evo.strategy", "uniform"): {"searches.evo": {"strategy": "uniform", "variants": "gptq", "target": 3.0}},
    ("searches.evo.variants", "second"): {"variants.second": {"method": "gptq", "bits": [2, 3, 4], "group_size": 8}},
}


def replaced(settings: dict[str, Any], path: str, value: Any, sources: Path) -> dict[str, Any]:
    """Copy of the settings with another value at a dotted path."""
    changed = deepcopy(settings)
    *sections, last = path.split(".")
    place = changed
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = yaml.safe_load(yaml.safe_dump(value).replace("{sources}", str(sources)))
    return changed


def changed(settings: dict[str, Any], path: str, value: Any, sources: Path) -> dict[str, Any]:
    """The same, with what must go with it."""
    if path.endswith(".source") and path.startswith("data."):
        section = path.removesuffix(".source")
        return replaced(settings, section, {"source": value, "tokens": 512, "sequence_length": 32}, sources)
    if path == "searches.evo.survivors":
        settings = replaced(settings, "searches.evo.tokens", [64, 128], sources)
    if path == "searches.evo.population":
        settings = replaced(settings, "searches.evo.survivors", [2], sources)
    if path == "searches.evo.start_from":
        other = {"strategy": "uniform", "variants": "gptq", "target": 3}
        settings = replaced(settings, "searches.other", other, sources)
    if path == "searches.evo.seeds":
        evo = {key: content for key, content in settings["searches"]["evo"].items() if key != "seed"}
        settings = replaced(settings, "searches.evo", evo, sources)
    also = ALSO.get((path, value)) if isinstance(value, str) else None
    for other, content in (also or {path: value}).items():
        settings = replaced(settings, other, content, sources)
    return replaced(settings, path, value, sources) if also else settings


EDIT = b"\nEDITED = True\n"
"""Code that could change results."""


@contextmanager
def edited(path: Path, more: bytes) -> Iterator[None]:
    """Append to a file for a while; afterwards its content and its time are the old ones."""
    before, times = path.read_bytes(), path.stat()
    path.write_bytes(before + more)
    try:
        yield
    finally:
        path.write_bytes(before)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.fixture(scope="module")
def elsewhere(sources: Path) -> Path:
    """Copies of the sources under other names, for settings that name them."""
    shutil.copytree(sources / "model", sources / "copy", dirs_exist_ok=True)
    shutil.copy(sources / "held.txt", sources / "other.txt")
    (sources / "model.gguf").touch()
    return sources


@pytest.mark.parametrize(("path", "value", "expected"), CHANGES, ids=[f"{path}={value}" for path, value, _ in CHANGES])
def test_a_setting_repeats_what_depends_on_it(
    finished: Checkout, settings: dict[str, Any], elsewhere: Path, path: str, value: Any, expected: set[str]
) -> None:
    assert finished.plan(changed(settings, path, value, elsewhere)) == expected


def test_every_setting_is_in_the_table() -> None:
    named = {path for path, _, _ in CHANGES} | {"name"}
    kinds = {"", "folder", "file", "gptq", "evolution"}
    wanted = {row.path for row in rows(Settings) if row.kind in kinds}
    generic = {
        path.replace(".held.", ".<name>.").replace(".gptq.", ".<name>.").replace(".evo.", ".<name>.") for path in named
    }
    elsewhere = {"studies", "searches.<name>.exports[].exporter"}  # test_study_rules.py; a form of `exports`
    elsewhere |= {path for path in wanted if path.startswith("evaluation.runtime.")}  # test_runtime_rules.py
    elsewhere |= {path for path in wanted if path.startswith("searches.<name>.target.")}  # forms of `target`
    assert wanted - elsewhere - generic == set()


def test_another_name_repeats_everything(finished: Checkout, settings: dict[str, Any]) -> None:
    assert finished.plan({**settings, "name": "other"}) == MODEL


def test_nothing_changed_repeats_nothing(finished: Checkout, settings: dict[str, Any]) -> None:
    assert finished.plan(settings) == set()
    assert finished.plan(settings, cores=1) == set()


def test_touched_files_repeat_nothing(finished: Checkout, settings: dict[str, Any], sources: Path) -> None:
    files = [path for part in (finished.root, sources) for path in part.rglob("*") if path.is_file()]
    before = {path: path.stat() for path in files if ".snakemake" not in path.parts}
    for path in before:
        os.utime(path)
    assert finished.plan(settings) == set()
    for path, times in before.items():  # other tests share the sources
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("calibration.txt", CALIBRATION),
        ("search.txt", SEARCH_TEXT),
        ("held.txt", HELD_OUT),
        ("model/config.json", MODEL),
    ],
)
def test_an_edited_source_repeats_what_reads_it(
    finished: Checkout, settings: dict[str, Any], sources: Path, name: str, expected: set[str]
) -> None:
    with edited(sources / name, b"\n"):
        assert finished.plan(settings) == expected


@pytest.mark.parametrize(
    ("folder", "name", "expected"),
    [("model", "tokenizer_config.json", MODEL), ("config/tasks", "everyday.jsonl", TASKS)],
)
def test_a_file_that_comes_or_goes_repeats_what_reads_its_folder(
    finished: Checkout, settings: dict[str, Any], sources: Path, folder: str, name: str, expected: set[str]
) -> None:
    """Even if it is older than what was made without it."""
    place = (sources if folder == "model" else finished.root) / folder
    more, gone = place / "more.txt", place / name
    more.write_text("more")
    os.utime(more, (0, 0))
    try:
        assert finished.plan(settings) == expected
    finally:
        more.unlink()
    aside = gone.rename(finished.root / gone.name)
    try:
        assert finished.plan(settings) == expected
    finally:
        aside.rename(gone)
    assert finished.plan(settings) == set()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("evopress/util/errors.py", MODEL),
        ("evopress/models/sources.py", MODEL),
        ("evopress/config/data.py", TOKENS | CALIBRATION | SEARCH_TEXT | HELD_OUT),
        ("evopress/data/encoder.py", TOKENS | CALIBRATION | SEARCH_TEXT | HELD_OUT),
        ("evopress/compression/hessian.py", HESSIANS),
        ("evopress/compression/gptq.py", VARIANTS),
        ("evopress/search/candidates.py", SEARCH),
        ("evopress/search/strategies/evolution.py", SEARCH),
        ("evopress/search/strategies/uniform.py", set()),  # another search's
        ("evopress/compression/methods/gptq.py", VARIANTS),
        ("evopress/compression/methods/pruning.py", set()),
        ("evopress/search/base.py", SEARCH),
        ("evopress/export/stage.py", STITCH),
        ("evopress/export/exporters/huggingface.py", STITCH),
        ("evopress/export/card.py", {"card evo huggingface"}),
        ("evopress/evaluation/perplexity.py", HELD_OUT - {"tokens held"}),
        ("evopress/evaluation/tasks.py", TASKS),
        ("config/tasks/everyday.jsonl", TASKS),
        ("evopress/report/page.py", REPORT),
        ("evopress/report/page.html.j2", REPORT),
        ("evopress/report/sections.html.j2", REPORT),
        ("evopress/report/page.js", REPORT),
        ("evopress/export/level_map.py", {"card evo huggingface"} | REPORT),
        ("scripts/stage.py", set()),
        ("evopress/cli/stage.py", set()),
        ("workflow/studies/run.py", set()),
        ("evopress/workflow/settings.py", REPORT),  # which plans the run again, to compare
        ("evopress/workflow/code_dependencies.py", set()),
        ("config/config.yaml", set()),
        ("workflow/profiles/default/config.yaml", set()),
    ],
)
def test_an_edited_file_of_the_project_repeats_the_stages_that_use_it(
    finished: Checkout, settings: dict[str, Any], name: str, expected: set[str]
) -> None:
    with edited(finished.root / name, EDIT if name.endswith(".py") else b"\n"):
        assert finished.plan(settings) == expected


@pytest.mark.parametrize("words", [b"\n# a comment\n", b'\n"""Words."""\n', b"\n\n"])
def test_edited_words_repeat_nothing(finished: Checkout, settings: dict[str, Any], words: bytes) -> None:
    with edited(finished.root / "evopress/util/errors.py", words):
        assert finished.plan(settings) == set()


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("searches.evo.generations", 3, {"search evo", "export evo archive"}),
        ("variants.gptq.bits", [2, 3, 4, 5], {"variants gptq", "search evo", "export evo archive"}),
        ("evaluation.tasks.limit", 5, set()),
        ("data.evaluation.held.seed", 1, set()),
    ],
)
def test_an_archive_follows_its_search(
    finished: Checkout, settings: dict[str, Any], sources: Path, path: str, value: Any, expected: set[str]
) -> None:
    assert finished.plan(settings, targets=["archives"]) == set()
    assert finished.plan(replaced(settings, path, value, sources), targets=["archives"]) == expected


def test_edited_code_of_the_archive_repeats_it_alone(finished: Checkout, settings: dict[str, Any]) -> None:
    with edited(finished.root / "evopress/export/exporters/archive.py", EDIT):
        assert finished.plan(settings, targets=["all", "archives"]) == {"export evo archive"}
