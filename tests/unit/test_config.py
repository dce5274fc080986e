"""Settings: what is refused and how it is said, overlays, slices, and what is generated from the classes."""

import json
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from evopress.compression.base import Method
from evopress.config.base import Section
from evopress.config.data import TextSettings
from evopress.config.model import ModelSettings
from evopress.search.base import Strategy
from evopress.util.errors import ArtifactError, ConfigError
from evopress.workflow import slices
from evopress.workflow.history import require_settings
from evopress.workflow.reference import reference, rows, sections_of
from evopress.workflow.settings import Settings, lay_over, read_yaml

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = {"source": "python_docs", "tokens": 4096}
BASE: dict[str, Any] = {
    "name": "run",
    "model": {"source": "folder", "path": "model"},
    "data": {"calibration": TEXT, "search": TEXT, "evaluation": {"held": TEXT}},
    "variants": {"gptq": {"method": "gptq"}},
    "searches": {
        "q3": {"strategy": "evolution", "variants": "gptq", "target": 3, "survivors": [2, 1], "tokens": [2048, 4096]},
        "flat": {"strategy": "uniform", "variants": "gptq", "target": 3},
    },
}
FLAT = BASE["searches"]["flat"]


def load(overlay: dict[str, Any]) -> Settings:
    return Settings.load(lay_over(BASE, overlay))


def test_paths_may_start_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert load({"model": {"source": "folder", "path": "~/model"}}).model.path == "/home/someone/model"  # type: ignore[union-attr]


def test_the_default_is_valid_and_complete_files_need_nothing_else() -> None:
    default = yaml.safe_load((REPOSITORY / "config/config.yaml").read_text())
    settings = Settings.load(default)
    assert settings.model.blocks == 30
    assert set(settings.searches) == {"uniform", "evopress"}


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ({"serches": {}}, "settings: unknown key 'serches': did you mean 'searches'?"),
        ({"searches": {"q3": {"generatons": 3}}}, "searches.q3: unknown key 'generatons': did you mean 'generations'?"),
        (
            {"compute": {"zebra": 1}},
            "compute: unknown key 'zebra': known keys: blocks_per_job, container, device, memory_gb, processes, "
            "threads",
        ),
        ({"searches": {"q3": {"generations": "many"}}}, "searches.q3.generations: Input should be a valid integer"),
        (
            {"searches": {"q3": {"start": "even"}}},
            "searches.q3.start: Input should be 'uniform', 'sensitivity' or 'scores'",
        ),
        ({"searches": {"q3": {"target": 1.5}}}, "searches.q3.target: 1.5 bits is below the lowest level (2)"),
        (
            {"searches": {"q3": {"target": {"byte": 9}}}},
            "searches.q3.target: unknown key 'byte': did you mean 'bytes'?",
        ),
        ({"searches": {"q3": {"target": {"bytes": "9 X"}}}}, "searches.q3.target.bytes: '9 X' is no size; write it as"),
        ({"searches": {"q3": {"target": 6.5}}}, "searches.q3.target: 6.5 bits is above the highest level (6)"),
        (
            {"searches": {"q3": {"variants": "gptg"}}},
            "searches.q3.variants: no variants are named 'gptg'",
        ),
        ({"searches": {"q3": {"tokens": [2048]}}}, "searches.q3: survivors has 2 steps and tokens has 1"),
        ({"searches": {"q3": {"survivors": [4, 2]}}}, "searches.q3: survivors must end in population (1"),
        ({"searches": {"q3": {"tokens": [2048, 8192]}}}, "searches.q3.tokens: 8192 tokens are more than data.search"),
        ({"searches": {"q3": {"initial_tokens": 9999}}}, "searches.q3.initial_tokens: 9999 tokens are more than"),
        ({"searches": {"dense": FLAT}}, "searches.dense: the name is taken by the uncompressed model"),
        ({"searches": {"a/b": FLAT}}, "'a/b' cannot name a file"),
        ({"variants": {"new": {"bits": [3]}}}, "variants.new: the key 'method' is missing"),
        ({"data": {"evaluation": {"search": TEXT}}}, "data.evaluation.search: the name is taken by data.search"),
        ({"data": {"evaluation": {"held": None}}}, "data.evaluation: is empty: give at least one entry"),
        ({"searches": {"q3": {"tokens": 2048}}}, "searches.q3.tokens: must be a list, as in [2048]"),
        ({"searches": {"q3": "evolution"}}, "searches.q3: must be a section with keys of its own, not 'evolution'"),
        ({"searches": {"q3": {"strategy": "evolutio"}}}, "searches.q3: unknown strategy 'evolutio': did you mean"),
        (
            {"variants": {"gptq": {"method": "awq"}}},
            "variants.gptq: unknown method 'awq': there are: gptq, gguf, sparsegpt",
        ),
        ({"searches": {3: FLAT}}, "must be text: put it in quotes, '3'"),
        ({"compute": None}, "compute: is empty: give it keys, or leave it out"),
        ({"compute": {"device": "gpu"}}, "compute.device: 'gpu' is not a device; use auto, cpu, cuda or cuda:N"),
        ({"model": {"source": "hub", "id": "a b/c"}}, "model.id: 'a b/c' is no repository of the hub: write it as in"),
        ({"model": {"source": "hub", "id": "a/b/c"}}, "model.id: 'a/b/c' is no repository of the hub"),
        ({"variants": {"gptq": {"bits": [1, 2]}}}, "variants.gptq.bits: bit-widths must lie between 2 and 8"),
        (
            {"variants": {"gptq": {"propagation": "sequential"}}},
            "variants.gptq: propagation_level: needed with `propagation: sequential`; choose one of 2, 3, 4, 5, 6",
        ),
        (
            {"variants": {"gptq": {"propagation": "sequential", "propagation_level": "7"}}},
            "variants.gptq: propagation_level: '7' is not made; choose one of 2, 3, 4, 5, 6",
        ),
        (
            {"variants": {"s": {"method": "wanda", "levels": 1, "propagation": "sequential"}}},
            "variants.s: propagation_level: needed with `propagation: sequential`; choose one of -1, 0, +1",
        ),
        (
            {"variants": {"gptq": {"propagation": "compressed", "propagation_level": "3"}}},
            "variants.gptq.propagation: Input should be 'dense' or 'sequential'",
        ),
        (
            {"variants": {"gptq": {"propagation_level": "3"}}},
            "variants.gptq: propagation_level: nothing is compressed underway",
        ),
        (
            {"variants": {"s": {"method": "wanda", "bits": 4}}},
            "variants.s: bits: weights that are kept stay as they are; `method: sparsegpt` rounds them as well",
        ),
        ({"variants": {"s": {"method": "sparsegpt", "bits": 1}}}, "variants.s.bits: Input should be greater than or"),
        (
            {"variants": {"s": {"method": "sparsegpt", "group_size": 64}}},
            "variants.s: group_size: weights that are not rounded share no scale; set `bits` as well",
        ),
        (
            {"variants": {"s": {"method": "sparsegpt", "bits": 4, "group_size": 6, "patterns": ["2:4"]}}},
            "variants.s: group_size: 6 is no multiple of the 4 of the pattern 2:4",
        ),
        ({"variants": {"s": {"method": "wanda", "sparsity": 1}}}, "variants.s.sparsity: Input should be less than 1"),
        (
            {"variants": {"s": {"method": "wanda", "sparsity": 0}}},
            "variants.s.sparsity: Input should be greater than 0",
        ),
        ({"name": "a\nb"}, "name: 'a\\nb' cannot name a file"),
        (
            {"evaluation": {"runtime": True}},
            "evaluation.runtime: no search exports a GGUF file, which the runtime could run; add `exports: [gguf]`",
        ),
        ({"evaluation": {"runtime": {"tokns": 1}}}, "evaluation.runtime: unknown key 'tokns': did you mean 'tokens'?"),
        ({"evaluation": {"runtime": {"tokens": 0}}}, "evaluation.runtime.tokens: Input should be greater than or"),
        ({"evaluation": {"runtime": 3}}, "evaluation.runtime: must be a section with keys of its own, not 3"),
        ({"name": ".."}, "name: '..' cannot name a file"),
        ({"model": {"source": "pypi"}}, "model.package: Field required"),
    ],
)
def test_refusals_name_the_setting_and_the_way_out(overlay: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(overlay)
    assert any(line.startswith(message) or message in line for line in str(error.value).splitlines()), error.value


def test_the_runtime_is_measured_where_it_is_asked_for() -> None:
    file = {"searches": {"q3": {"exports": [{"exporter": "gguf", "dequantize": True}], "seeds": [0, 1]}}}
    assert load(file).in_runtime() == []
    for asked in (True, {}, {"tokens": 64}):
        settings = load({**file, "evaluation": {"runtime": asked}})
        assert settings.in_runtime() == ["dense", "q3-seed0", "q3-seed1"]  # `flat` exports no GGUF file
        assert settings.evaluation.runtime is not None
        assert settings.evaluation.runtime.tokens == (64 if asked == {"tokens": 64} else 4096)
    for left_out in (False, None):
        assert load({**file, "evaluation": {"runtime": left_out}}).in_runtime() == []


def test_every_model_answers_the_tasks_that_are_named() -> None:
    file = {"searches": {"q3": {"seeds": [0, 1]}}}
    assert load(file).on_tasks() == []
    named = load({**file, "evaluation": {"tasks": {"names": ["everyday"], "include_path": "config/tasks"}}})
    assert named.on_tasks() == ["dense", *named.searches] and "q3-seed1" in named.searches


def test_every_problem_has_its_line() -> None:
    with pytest.raises(ConfigError) as error:
        load({"searches": {"q3": {"target": 1}, "flat": {"target": 9}}})
    assert len(str(error.value).splitlines()) == 2


def test_a_name_that_is_given_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("searches:\n  a: &a {target: 3}\n  b: {<<: *a, target: 4}\n  a: {target: 2}\n")
    with pytest.raises(ConfigError, match=r"twice\.yaml: .*line 4: 'a' is given twice"):
        read_yaml(tmp_path / "twice.yaml")
    (tmp_path / "once.yaml").write_text("a: &a {target: 3}\nb: &b {<<: *a, target: 4}\nc: {<<: *b, target: 5}\n")
    assert read_yaml(tmp_path / "once.yaml")["b"] == {"target": 4}


def test_an_overlay_changes_one_key_and_removes_what_it_sets_to_null() -> None:
    settings = load({"searches": {"q3": {"seed": 7}, "flat": None}})
    assert settings.searches["q3"] == load({}).searches["q3"].model_copy(update={"seed": 7})
    assert list(settings.searches) == ["q3"]


def test_an_overlay_of_another_kind_replaces_the_section() -> None:
    settings = load({"model": {"source": "hub", "id": "a/b"}})
    assert settings.model.model_dump(exclude_defaults=True) == {"id": "a/b"}


def test_an_overlay_leaves_the_default_as_it_was() -> None:
    before = deepcopy(BASE)
    load({"searches": {"q3": {"seed": 7}}})
    assert before == BASE


@pytest.mark.parametrize(
    ("annotation", "where", "slice_of"),
    [
        (ModelSettings, {"model": None}, slices.model_slice),
        (TextSettings, {"data": {"search": None}}, lambda settings: slices.tokens_slice(settings, "search")),
        (Method, {"variants": {"gptq": None}}, lambda settings: slices.variants_slice(settings, "gptq")),
        (Strategy, {"searches": {"q3": None}}, lambda settings: slices.search_slice(settings, "q3")),
    ],
)
def test_every_field_of_every_kind_is_in_the_slice_of_its_stage(
    annotation: Any, where: dict[str, Any], slice_of: Callable[[Settings], str]
) -> None:
    """With tests/workflow, where a changed slice repeats its stage, this covers the kinds that it does not run."""
    for kind in sections_of(annotation)[0]:
        section = kind.model_construct(**dict.fromkeys(kind.model_fields, "x"))
        settings = load({}).model_copy(update=filled(where, section))
        with warnings.catch_warnings(action="ignore"):  # "x" is no number
            elsewhere = {"blocks", "seeds", "exports", "polish", "sizes", "smallest", "largest", "points"}
            elsewhere |= {"base_model"}  # of cards
            assert set(json.loads(slice_of(settings))) == set(kind.model_fields) - elsewhere, kind


def test_how_weights_would_be_rounded_is_in_no_slice_unless_they_are() -> None:
    plain, rounded = (
        json.loads(slices.variants_slice(load({"variants": {"s": {"method": "sparsegpt", **more}}}), "s"))
        for more in ({}, {"bits": 4})
    )
    assert rounded == plain | {"bits": 4, "group_size": 64} and not {"bits", "group_size"} & plain.keys()


def filled(where: dict[str, Any], section: Section) -> dict[str, Any]:
    """Put ``section`` where None stands, keeping what a mapping below a section needs."""
    [(name, below)] = where.items()
    if below is None:
        return {name: section}
    if name == "data":
        return {"data": load({}).data.model_copy(update=filled(below, section))}
    return {name: filled(below, section)}


def test_the_reference_tells_every_setting_once_and_what_it_means() -> None:
    text = reference()
    assert text.count("`searches.<name>.generations`") == 1
    assert text.count("`data.<text>.sequence_length`") == 1
    assert [row.path for row in rows(Settings) if not row.description] == []


@pytest.mark.parametrize("settings", ['{"a": 1, "new": 3}', '{"a": 1}'])
def test_artifacts_of_the_same_settings_pass(tmp_path: Path, settings: str) -> None:
    manifest = tmp_path / "a.json"
    manifest.write_text('{"provenance": {"settings": "{\\"a\\": 1, \\"old\\": 2}"}}')
    require_settings([(manifest, settings), (tmp_path / "missing.json", settings)], tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"provenance": {"settings": "{\\"a\\": 1}"}}', r"a\.json: was made by other settings \(a: 1, now 2\)"),
        ("{}", r"a\.json: no readable provenance"),
        ("cut sh", r"a\.json: no readable provenance"),
    ],
)
def test_artifacts_of_other_settings_are_named(tmp_path: Path, content: str, message: str) -> None:
    manifest = tmp_path / "a.json"
    manifest.write_text(content)
    with pytest.raises(ArtifactError, match=message):
        require_settings([(manifest, '{"a": 2}')], tmp_path)


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ({"searches": {"Q3": FLAT}}, "searches.Q3: differs from 'q3' in case alone"),
        ({"searches": {"Dense": FLAT}}, "searches.Dense: differs from 'dense' in case alone"),
        ({"variants": {"GPTQ": {"method": "gptq"}}}, "variants.GPTQ: differs from 'gptq' in case alone"),
        ({"data": {"evaluation": {"Held": TEXT}}}, "data.evaluation.Held: differs from 'held' in case alone"),
        ({"data": {"evaluation": {"SEARCH": TEXT}}}, "data.evaluation.SEARCH: differs from 'search' in case alone"),
    ],
)
def test_names_that_some_file_systems_take_for_the_same_are_refused(overlay: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(overlay)
    assert str(caught.value).startswith(message) and len(str(caught.value).splitlines()) == 1


def test_names_may_differ_in_more_than_case_and_across_sections() -> None:
    load({"searches": {"gptq": FLAT, "q3b": FLAT}, "variants": {"held": {"method": "gptq"}}})


def test_modules_that_are_dropped_are_not_polished() -> None:
    drop = {"strategy": "evolution", "variants": "modules", "target": 7, "polish": "sequential"}
    message = r"searches\.less\.polish: makes levels of linear layers anew, but 'modules' drops modules"
    with pytest.raises(ConfigError, match=message):
        load({"variants": {"modules": {"method": "drop"}}, "searches": {"less": drop}})


def test_a_polish_belongs_to_the_export_and_not_to_the_search() -> None:
    plain, polished = (load({"searches": {"q3": {"polish": how}}}) for how in ("none", "asymmetric"))
    assert slices.search_slice(plain, "q3") == slices.search_slice(polished, "q3")
    own = json.loads(slices.polish_slice(polished, "q3"))
    assert own["polish"] == "asymmetric" and own["method"] == "gptq" and own["group_size"] == 64
    exports = [json.loads(slices.export_slice(each, "q3", "huggingface")) for each in (plain, polished)]
    assert [each["polish"] for each in exports] == ["none", "asymmetric"]
