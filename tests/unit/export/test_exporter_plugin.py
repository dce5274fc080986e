"""An exporter from outside of the package, which everything serves without an edit."""

import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from finished_run import make_results, provenance, write_configuration
from plugins.levels_csv import LevelsCsv

from evopress.artifacts.exports import load_export_manifest, read_export_manifest
from evopress.artifacts.paths import Run
from evopress.artifacts.tables import VARIANTS, write_table
from evopress.config.context import StageContext
from evopress.export.card import write_card
from evopress.export.exporters import EXPORTERS
from evopress.export.exporters.decilm import DeciLm
from evopress.export.exporters.huggingface import HuggingFace
from evopress.export.stage import run_export
from evopress.util.errors import ArtifactError, ConfigError, DamagedError
from evopress.workflow.history import require_settings
from evopress.workflow.reference import reference, schema
from evopress.workflow.settings import Settings
from evopress.workflow.slices import expected_slices, export_slice, search_slice

TEXT = {"source": "python_docs", "tokens": 4096, "sequence_length": 512}

SEARCH = {"variants": "v", "target": 3, "tokens": [512, 512, 512]}


@pytest.fixture(autouse=True)
def levels_csv() -> Iterator[None]:
    """The one line that registers it; undone after the test."""
    EXPORTERS.register(LevelsCsv)
    yield
    EXPORTERS.plugins.remove(LevelsCsv)


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    run = make_results(tmp_path)
    write_configuration(run, "s", level="3")
    made = provenance({"method": "gptq"})
    write_table(pd.DataFrame(columns=VARIANTS.names), run.variant_table("gptq", 0), VARIANTS, made)
    return StageContext(run)


def settings(*exports: object, method: str = "gptq", **search: object) -> Settings:
    return Settings.load(
        {
            "name": "run",
            "model": {"source": "folder", "path": "/nowhere"},
            "data": {"calibration": TEXT, "search": TEXT, "evaluation": {"held_out": TEXT}},
            "variants": {"v": {"method": method}},
            "searches": {"s": {"strategy": "random", **SEARCH, "exports": list(exports), **search}},
        }
    )


def test_settings_take_it_by_name_or_as_a_section() -> None:
    assert settings().exports_of("s") == [HuggingFace()]
    assert settings("csv").exports_of("s") == [HuggingFace(), LevelsCsv()]
    own = [{"exporter": "csv", "separator": ";"}, {"exporter": "huggingface", "shard_bytes": 9}]
    assert settings(*own).exports_of("s") == [HuggingFace(shard_bytes=9), LevelsCsv(separator=";")]
    assert settings("csv", seeds=[0, 1]).exports_of("s-seed1") == [HuggingFace(), LevelsCsv()]
    made = settings(own[0])
    assert made.exporter_of("s", "csv") == LevelsCsv(separator=";") and made.exporter_of("s", "decilm") == DeciLm()


@pytest.mark.parametrize(
    ("exports", "problem"),
    [
        (["cvs"], r"searches\.s\.exports: unknown exporter 'cvs': did you mean 'csv'\?"),
        ([{"exporter": "csv", "seperator": ";"}], r"exports: unknown key 'seperator': did you mean 'separator'\?"),
        ([{"exporter": "csv", "separator": ""}], r"searches\.s\.exports\.separator: "),
        (["csv", {"exporter": "csv"}], r"searches\.s\.exports: csv is named twice"),
        ([{"separator": ";"}], r"searches\.s\.exports: the key 'exporter' is missing"),
        ([3], r"searches\.s\.exports: must be a section with keys of its own, not 3"),
        (["decilm"], r"searches\.s\.exports: decilm is for models that lost modules, and 'v' drops none"),
    ],
)
def test_exports_that_cannot_be_are_named(exports: list[object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        settings(*exports)


def test_models_that_lost_modules_have_all_forms() -> None:
    assert settings("decilm", "archive", method="drop", target=1).exports_of("s")[1:] != []


def test_what_a_search_finds_does_not_depend_on_its_exports() -> None:
    assert search_slice(settings("csv"), "s") == search_slice(settings(), "s")
    assert export_slice(settings("csv"), "s", "csv") != export_slice(settings("csv", seed=1), "s", "csv")


def test_schema_and_reference_know_it() -> None:
    whole = json.loads(schema())
    names, kinds = whole["$defs"]["RandomSearch"]["properties"]["exports"]["items"]["anyOf"]
    assert names["enum"] == EXPORTERS.names and kinds["discriminator"]["mapping"]["csv"] == "#/$defs/LevelsCsv"
    assert "separator" in whole["$defs"]["LevelsCsv"]["properties"]
    assert "`csv`: The level of each unit as CSV." in reference()
    assert "| `searches.<name>.exports[].separator` |" in reference()


def test_the_stage_writes_a_folder_and_its_manifest(context: StageContext) -> None:
    run_export(context, "s", LevelsCsv(separator=";"))
    folder = context.run.export("s", "csv")
    table = pd.read_csv(folder / "levels.csv", sep=";")
    assert len(table) == 14 and set(table["level"]) == {3}
    manifest = read_export_manifest(context.run, "s", "csv")
    assert list(manifest["files"]) == ["levels.csv"] and manifest["search"] == "s"
    assert json.loads(manifest["provenance"]["settings"])["separator"] == ";"
    (folder / "levels.csv").write_text("unit\n")
    with pytest.raises(DamagedError, match=r"levels\.csv: damaged"):
        read_export_manifest(context.run, "s", "csv")


def test_an_export_of_other_settings_is_named(context: StageContext) -> None:
    run, made = context.run, settings({"exporter": "csv", "separator": ";"})
    run_export(context, "s", LevelsCsv())
    expected = dict(expected_slices(made, run, []))
    manifest = run.export_manifest("s", "csv")
    with pytest.raises(
        ArtifactError, match=r'exports/s/csv\.json: was made by other settings .*separator: ",", now ";"'
    ):
        require_settings([(manifest, expected[manifest])], run.root)


def test_a_failing_exporter_leaves_the_last_export(context: StageContext, monkeypatch: pytest.MonkeyPatch) -> None:
    run_export(context, "s", LevelsCsv())
    before = load_export_manifest(context.run.export_manifest("s", "csv"))
    monkeypatch.setattr(LevelsCsv, "write", lambda *arguments: (_ for _ in ()).throw(ArtifactError("cannot")))
    with pytest.raises(ArtifactError, match="cannot"):
        run_export(context, "s", LevelsCsv(separator=";"))
    assert read_export_manifest(context.run, "s", "csv") == before


def test_the_card_says_how_to_use_it(context: StageContext) -> None:
    run: Run = context.run
    with pytest.raises(ArtifactError, match="missing; run the stage that writes it"):
        write_card(context, "s", LevelsCsv())
    run_export(context, "s", LevelsCsv())
    write_card(context, "s", LevelsCsv())
    text = run.card("s", "csv").read_text()
    assert f'## Usage\n\n`pandas.read_csv("{run.export("s", "csv")}/levels.csv", sep=",")`' in text
    assert "base_model: someone/tiny-llama" in text and "base_model_relation" not in text
    assert "library_name: pandas" in text and "AutoModelForCausalLM" not in text
    assert "| bits per weight reached | 3.0000 |" in text
    read_export_manifest(run, "s", "csv")  # the card is no part of it
