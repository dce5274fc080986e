"""A family and a method from outside of the package, each part of which is served without an edit."""

import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from finished_run import make_results, provenance, write_tokens
from plugins.mean_sign import SIGNS, DenseFormat, MeanSign, SignFormat
from report_page import write_way

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import CONFIGURATION, LAYERS, VARIANTS, read_provenance, read_table, write_table
from evopress.compression.families import FAMILIES, family_named, family_of
from evopress.compression.formats import FORMATS, decode
from evopress.compression.hessian import accumulate_hessians
from evopress.compression.methods import METHODS, register
from evopress.compression.size import compressed_size
from evopress.compression.stage import make_variants
from evopress.compression.store import VariantStore
from evopress.config.base import parse_json
from evopress.config.context import ComputeSettings, StageContext
from evopress.config.data import HessianSettings
from evopress.config.evaluation import TaskSettings
from evopress.evaluation.perplexity import evaluate_perplexity
from evopress.evaluation.tasks import evaluate_tasks
from evopress.export.card import write_card
from evopress.export.exporters.archive import ARCHIVE, Archive, load_archive
from evopress.export.exporters.huggingface import HuggingFace
from evopress.export.stage import run_export
from evopress.models.blockwise import BlockwiseModel
from evopress.models.checkpoint import Checkpoint
from evopress.models.structure import layer_table
from evopress.plan.text import plan
from evopress.report.page import write_report
from evopress.search.strategies.random import RandomSearch
from evopress.util.errors import ArtifactError, ConfigError
from evopress.workflow.reference import reference, schema
from evopress.workflow.settings import Settings
from evopress.workflow.slices import variants_slice

TEXT = {"source": "python_docs", "tokens": 4096, "sequence_length": 512}


@pytest.fixture(autouse=True)
def mean_sign() -> Iterator[None]:
    """The one line that registers the method, its family and its formats; undone after the test."""
    register(MeanSign, SignFormat, DenseFormat)
    yield
    METHODS.plugins.remove(MeanSign)
    FAMILIES.remove(SIGNS)
    for form in (SignFormat, DenseFormat):
        FORMATS.remove(form)


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    """A tiny model with Hessians and variants."""
    run = make_results(tmp_path)
    layers = layer_table(BlockwiseModel.from_folder(run.model, torch.device("cpu")).model)
    write_table(layers, run.layers, LAYERS, provenance())
    write_tokens(run, "calibration", sequences=6)
    context = StageContext(run, ComputeSettings(device="cpu"))
    accumulate_hessians(context, HessianSettings(), 0)
    for block in layers["block"].unique():
        make_variants(context, "signs", MeanSign(), [int(block)])
    return context


def settings(target: float = 0.5, **variants: object) -> Settings:
    return Settings.load(
        {
            "name": "run",
            "model": {"source": "folder", "path": "/nowhere"},
            "data": {"calibration": TEXT, "search": TEXT, "evaluation": {"held_out": TEXT}},
            "variants": {"signs": {"method": "mean_sign", **variants}},
            "searches": {"s": {"strategy": "random", "variants": "signs", "target": target, "tokens": [512, 512, 512]}},
        }
    )


def test_settings_take_the_method_and_check_it() -> None:
    made = settings(exclude=["*.down_proj"])
    assert made.variants["signs"] == MeanSign(exclude=("*.down_proj",))
    assert parse_json(METHODS, variants_slice(made, "signs"), "variants.signs") == made.variants["signs"]
    with pytest.raises(ConfigError, match=r"variants\.signs: unknown key 'exclud': did you mean 'exclude'\?"):
        settings(exclud=[])
    with pytest.raises(ConfigError, match=r"searches\.s\.target: 1\.5 is no share of the weights"):
        settings(target=1.5)


def test_schema_and_reference_know_it() -> None:
    whole = json.loads(schema())
    kinds = whole["properties"]["variants"]["additionalProperties"]["discriminator"]["mapping"]
    assert kinds["mean_sign"] == "#/$defs/MeanSign" and "MeanSign" in whole["$defs"]
    assert "`mean_sign`: The signs of a row's weights times their mean absolute value." in reference()


def test_the_variants_are_those_that_were_planned(context: StageContext) -> None:
    run = context.run
    made = pd.concat([read_table(run.variant_table("signs", block), VARIANTS) for block in range(2)])
    planned = MeanSign().table(read_table(run.layers, LAYERS), 4, "variants.signs")
    by = ["block", "layer", "level"]
    for column in ("family", "value", "cost", "parameters", "bytes"):
        assert made.sort_values(by)[column].tolist() == planned.sort_values(by)[column].tolist(), column
    assert set(made["family"]) == {"signs"}
    assert (made.query("level == 'dense'")["error"] == 0).all() and (made.query("level == 'sign'")["error"] > 0).all()
    assert METHODS.parse(json.loads(read_provenance(run.variant_table("signs", 0)).settings), "variants") == MeanSign()


def test_weights_come_back_from_the_store(context: StageContext) -> None:
    store, checkpoint = VariantStore(context.run, "signs"), Checkpoint(context.run.model)
    layers = read_table(context.run.layers, LAYERS)
    for row in layers.itertuples():
        weight = checkpoint.read([f"{row.name}.weight"])[f"{row.name}.weight"]
        assert torch.equal(store.weight(row.block, row.layer, "dense"), weight)
        found = store.weight(row.block, row.layer, "sign")
        expected = torch.where(weight >= 0, 1.0, -1.0) * weight.abs().mean(1, keepdim=True)
        torch.testing.assert_close(found, expected)
    packed = store.packed(0, "mlp.up_proj", "sign")
    with pytest.raises(ArtifactError, match="do not fit weights"):
        decode("sign", packed, (3, 16), torch.float32)


def test_the_family_makes_a_space_of_the_table(context: StageContext) -> None:
    store = VariantStore(context.run, "signs")
    units = SIGNS.units(store.table, "none")
    total = sum(unit.parameters for unit in units)
    assert family_of(store.table) is SIGNS and SIGNS.budgets(units, 0.25, "searches.s") == (total // 4,)
    levels = [0, 1] * (len(units) // 2)
    share = sum(unit.parameters for unit, level in zip(units, levels, strict=True) if level) / total
    assert SIGNS.describe(units, levels) == f"{len(units)} layers, {share:.6g} of the weights dense on average"
    with pytest.raises(ConfigError, match=r"searches\.s\.target: 1\.5 signs is above the highest level \(1\)"):
        SIGNS.budgets(units, 1.5, "searches.s")


def test_sizes_count_what_is_stored(context: StageContext) -> None:
    checkpoint, table = Checkpoint(context.run.model), VariantStore(context.run, "signs").table
    chosen = table[table["level"] == "sign"].rename(columns={"name": "unit"})
    size = compressed_size(checkpoint, chosen)
    assert (size.family, size.average, size.bits) == (SIGNS, 0, 1)
    dense = 4 * int(chosen["parameters"].sum())
    assert size.total_bytes == sum(checkpoint.sizes().values()) - dense + int(chosen["bytes"].sum())


def test_its_models_are_written_and_told_of(context: StageContext) -> None:
    run, search = context.run, RandomSearch(variants="signs", target=0.5)
    layers = read_table(run.layers, LAYERS)
    chosen = VariantStore(run, "signs").table.query("level == 'sign' and block == 0").rename(columns={"name": "unit"})
    made = chosen.assign(variants="signs")[list(CONFIGURATION.names)]
    write_table(made, run.configuration("s"), CONFIGURATION, provenance(search.model_dump()))
    for exporter in (HuggingFace(), Archive()):
        run_export(context, "s", exporter)
    exported, archive = Checkpoint(run.export("s", "huggingface")), load_archive(run.export("s", "archive") / ARCHIVE)
    for row in layers.itertuples():
        name = f"{row.name}.weight"
        weight = exported.read([name])[name]
        dense = Checkpoint(run.model).read([name])[name]
        signs = torch.where(dense >= 0, 1.0, -1.0) * dense.abs().mean(1, keepdim=True)
        torch.testing.assert_close(weight, signs if row.block == 0 else dense)
        assert torch.equal(archive[name], weight)
    write_card(context, "s", HuggingFace())
    card = run.card("s", "huggingface").read_text()
    assert "# tiny-llama with 0% of its weights dense" in card
    assert "| dense share asked (compressed layers) | 0.5 |" in card
    write_tokens(run, "held_out")
    for model in ("dense", "s"):
        evaluate_perplexity(context, model, ["held_out"])
        evaluate_tasks(context, model, TaskSettings())
    write_way(run, "s", evolved=False)
    write_report(context, ["s"], [run.export("s", "huggingface")])
    assert "method: mean_sign" in run.report.read_text() and "dense" in run.summary.read_text()


def test_the_plan_asks_the_method(context: StageContext) -> None:
    made = settings()
    model = made.model.model_copy(update={"path": str(context.run.model)})
    text = plan(made.model_copy(update={"model": model}), Run(context.run.root.parent / "planned"))
    stored = VariantStore(context.run, "signs").table["bytes"].sum()
    (line,) = (line for line in text.splitlines() if line.startswith("variants signs"))
    assert f"{stored / 1000:.1f} kB" in line


def test_a_family_that_is_not_registered_is_named() -> None:
    FAMILIES.remove(SIGNS)
    try:
        with pytest.raises(ArtifactError, match="unknown family of levels 'signs'"):
            family_named("signs")
        with pytest.raises(ArtifactError, match="unknown family of levels 'signs'"):
            family_of(pd.DataFrame({"family": ["signs"]}))
    finally:
        FAMILIES.append(SIGNS)


def test_a_format_that_is_not_registered_is_named() -> None:
    with pytest.raises(ArtifactError, match="'signs9' is not a format of packed weights"):
        decode("signs9", {}, (1, 1), torch.float32)
