"""Settings of searches over several variants: what is refused and how it is said, keys, slices and the plan."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from large_models import write_settings

from evopress.artifacts.paths import Run
from evopress.export.exporters.gguf import GgufFile
from evopress.plan.text import plan
from evopress.search.strategies.evolution import Evolution
from evopress.search.target import SizeTarget
from evopress.util.errors import ConfigError
from evopress.workflow import slices
from evopress.workflow.foreseen import require_fit
from evopress.workflow.keys import Keys
from evopress.workflow.settings import Settings, load_settings

ROOT = Path(__file__).resolve().parents[2]
TEXT = {"source": "python_docs", "tokens": 4096}
SEARCH = {
    "strategy": "evolution",
    "variants": ["gptq", "sparse", "drop"],
    "target": {"bytes": "65 MB"},
    "survivors": [2, 1],
    "tokens": [2048, 4096],
}
BASE: dict[str, Any] = {
    "name": "run",
    "model": {"source": "folder", "path": "model"},
    "data": {"calibration": TEXT, "search": TEXT, "evaluation": {"held": TEXT}},
    "variants": {
        "gptq": {"method": "gptq"},
        "sparse": {"method": "sparsegpt"},
        "gguf": {"method": "gguf", "types": ["Q4_0", "Q8_0"]},
        "more": {"method": "gguf", "types": ["Q4_K", "Q8_0"], "rounding": "rtn"},
        "drop": {"method": "drop"},
        "blocks": {"method": "drop", "unit": "block"},
    },
    "searches": {"joint": SEARCH},
}


def load(**changes: object) -> Settings:
    values = deepcopy(BASE)
    values["searches"]["joint"].update(changes)
    return Settings.load(values)


@pytest.mark.parametrize("variants", [["gptq", "sparse"], ["gptq", "sparse", "drop"], ["drop", "gguf"]])
def test_several_variants_are_accepted_in_any_order(variants: list[str]) -> None:
    search = load(variants=variants).searches["joint"]
    assert search.sources == tuple(variants)


def test_a_list_of_one_is_that_one() -> None:
    one, name = (load(variants=variants, target=3).searches["joint"] for variants in (["gptq"], "gptq"))
    assert one == name and json.loads(one.model_dump_json())["variants"] == "gptq"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": []}, "variants: must be the name of variants, or several, as in [gguf, drop], not []"),
        ({"variants": 3}, "variants: must be the name of variants, or several, as in [gguf, drop], not 3"),
        ({"variants": ["gptq", "gptq"]}, "variants: 'gptq' is named twice"),
        ({"variants": ["gptq", "a b"]}, "variants: 'a b' cannot name a file"),
        ({"variants": ["gptq", "spars"]}, "variants: no variants are named 'spars': did you mean 'sparse'?"),
        ({"target": 3}, "target: levels of several variants have bytes in common and nothing else"),
        ({"strategy": "uniform"}, "variants: uniform chooses from one of the variants"),
        ({"variants": ["drop", "gptq", "blocks"]}, "variants: drop and blocks both drop modules; name one of them"),
        ({"variants": ["drop", "blocks"]}, "variants: none of drop, blocks has levels of linear layers"),
        ({"variants": "drop"}, "target: a search over dropped modules has no size of a file as its target"),
        ({"group_rule": "size"}, "group_rule: what a dropped module leaves is for all layers to spend"),
        ({"levels": ["3"]}, "levels: is for one of the variants"),
        ({"step_tokens": 256}, "step_tokens: is for one of the variants; remove it, or name one"),
        (
            {"variants": ["gptq", "sparse"], "target": {"bytes": "65 MB", "multiply_adds": 0.8}},
            "target.multiply_adds: only dropped modules save multiply-adds; name variants of `method: drop` as well",
        ),
        (
            {"variants": "gptq", "target": {"bytes": "65 MB", "multiply_adds": 0.8}},
            "target.multiply_adds: only dropped modules save multiply-adds",
        ),
        ({"target": {"bytes": "65 MB", "multiply_adds": 1.2}}, "target.multiply_adds: Input should be less than 1"),
        ({"polish": "sequential"}, "polish: makes levels of one of the variants anew"),
        ({"exports": ["gguf"]}, "exports: 'gptq' has levels that are no GGUF types"),
        (
            {"exports": ["gguf"], "variants": ["gguf", "drop"], "target": {"bytes": "65 MB", "file": "gguf"}},
            "target.file: how large a file without some of its modules is depends on which of them go",
        ),
        ({"exports": ["compressed_tensors"]}, "exports: the size of such a folder is not known"),
        ({"exports": ["decilm"], "variants": ["gptq", "sparse"]}, "exports: decilm is for models that lost modules"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    other = "strategy" in changes  # which has few settings
    values = deepcopy(BASE)
    values["searches"]["joint"] = {key: SEARCH[key] for key in (["variants", "target"] if other else SEARCH)} | changes
    with pytest.raises(ConfigError) as error:
        Settings.load(values)
    assert f"searches.joint.{message}" in str(error.value)


def test_sums_of_errors_from_the_table_know_no_modules() -> None:
    dp = {"strategy": "dp", "variants": ["gptq", "drop"], "target": {"bytes": "65 MB"}}
    with pytest.raises(ConfigError, match="modules that 'drop' drops have no errors in a table"):
        Settings.load({**BASE, "searches": {"dp": dp}})
    Settings.load({**BASE, "searches": {"dp": {**dp, "errors": "kl", "tokens": 512}}})


def test_efforts_and_fronts_take_several_variants() -> None:
    auto = {"strategy": "auto", "variants": ["drop", "gptq"], "target": {"bytes": "65 MB"}}
    front = {"strategy": "front", "variants": ["gptq", "drop"], "sizes": ["55 MB", "65 MB"]}
    steps = {"survivors": [2, 1], "tokens": [2048, 4096]}
    settings = Settings.load({**BASE, "searches": {"auto": auto, "front": {**front, **steps}}})
    best = settings.searches["auto"]
    assert isinstance(best, Evolution) and (best.start, best.group_rule) == ("sensitivity", "none")
    assert list(settings.searches) == ["auto", "front-55mb", "front-65mb"]
    effects = [search.effects() for search in settings.searches.values()]
    assert [found is not None and found.sources for found in effects] == [("drop", "gptq"), *[("gptq", "drop")] * 2]


def test_models_that_lost_modules_are_written_with_their_levels() -> None:
    search = load(variants=["gptq", "drop"], exports=["archive", "decilm"])
    assert [exporter.exporter for exporter in search.exports_of("joint")] == ["huggingface", "archive", "decilm"]


def test_the_size_is_that_of_the_file_unless_modules_are_dropped() -> None:
    of_file, packed = (
        load(variants=variants, exports=["gguf"]).searches["joint"].target
        for variants in (["gguf", "more"], ["gguf", "drop"])
    )
    assert isinstance(of_file, SizeTarget) and of_file.file == GgufFile()
    assert isinstance(packed, SizeTarget) and packed.file is None


def test_a_search_starts_from_those_over_some_of_its_variants() -> None:
    bits = {**SEARCH, "variants": "gptq"}
    Settings.load({**BASE, "searches": {"bits": bits, "joint": {**SEARCH, "start_from": ["bits"]}}})
    with pytest.raises(ConfigError, match="'joint' chooses from variants of another family"):
        Settings.load({**BASE, "searches": {"bits": {**bits, "start_from": ["joint"]}, "joint": SEARCH}})


def test_a_search_runs_again_when_any_of_its_variants_changes() -> None:
    before = Keys(load(), ROOT)
    for name, change in (("gptq", {"bits": [3, 4]}), ("sparse", {"step": 7}), ("drop", {"unit": "block"})):
        values = deepcopy(BASE)
        values["variants"][name].update(change)
        assert Keys(Settings.load(values), ROOT).search("joint") != before.search("joint")
    values = deepcopy(BASE)
    values["variants"]["gguf"]["types"] = ["Q4_0"]
    assert Keys(Settings.load(values), ROOT).search("joint") == before.search("joint")
    assert json.loads(slices.search_slice(load(), "joint"))["variants"] == ["gptq", "sparse", "drop"]


@pytest.mark.parametrize("rounding", [{}, {"bits": 4, "group_size": 128}])
def test_a_joint_search_can_be_planned(tmp_path: Path, rounding: dict[str, int]) -> None:
    variants = {
        "gptq": {"method": "gptq", "bits": [2, 3, 4], "group_size": 128},
        "sparse": {"method": "sparsegpt", "sparsity": 0.5, "levels": 1, **rounding},
        "drop": {"method": "drop"},
    }
    joint = {**SEARCH, "target": {"fraction": 0.2}, "start": "sensitivity"}
    path = write_settings(tmp_path, "7B", variants=variants, searches={"joint": joint})
    settings = load_settings([path])
    require_fit(settings, json.loads((tmp_path / "model" / "config.json").read_text()))
    assert "search joint, 150 generations" in plan(settings, Run(tmp_path / "run"))
    (tmp_path / "small").mkdir()
    path = write_settings(
        tmp_path / "small", "7B", variants=variants, searches={"joint": {**joint, "target": {"bytes": "100 MB"}}}
    )
    with pytest.raises(ConfigError, match=r"searches.joint.target: 100 MB is below the smallest file \([\d,.]+ MB\)"):
        plan(load_settings([path]), Run(tmp_path / "run"))
