"""A search over quantized and sparse levels and dropped modules, of a tiny model, from variants to the report."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from depth_run import without
from finished_run import provenance, tiny_model
from report_page import measure
from search_run import COMPUTE, fresh, prepare, search_with_effects
from transformers import AutoModelForCausalLM

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import CONFIGURATION, LAYERS, TRACE, read_table, write_table
from evopress.compression.base import Family
from evopress.compression.families import BITS, DROP, MIXED, family_of, of_modules
from evopress.compression.methods.drop import Drop, make_module_table
from evopress.compression.methods.gptq import Gptq
from evopress.compression.methods.pruning import SparseGpt
from evopress.compression.size import size_of
from evopress.compression.stage import make_variants
from evopress.compression.store import VariantStore
from evopress.config.context import StageContext
from evopress.config.evaluation import CardFacts
from evopress.export.card import render_card
from evopress.export.exporters.archive import ARCHIVE, Archive, load_archive
from evopress.export.exporters.huggingface import HuggingFace
from evopress.export.level_map import GONE
from evopress.export.stage import run_export
from evopress.models.checkpoint import Checkpoint
from evopress.models.modules import MLP
from evopress.report.page import write_report
from evopress.search.budget import step_costs, traded
from evopress.search.candidates import uniform_start
from evopress.search.configuration import Configuration
from evopress.search.offered import Constraints
from evopress.search.problem import open_variants, problem_of
from evopress.search.run import open_problem
from evopress.search.selection import State
from evopress.search.strategies.dp import DynamicProgramming
from evopress.search.strategies.evolution import Evolution
from evopress.search.target import SizeTarget
from evopress.util.errors import ConfigError

SMALL = {
    "generations": 5,
    "offspring": 8,
    "survivors": (3, 1),
    "tokens": (18, 48),
    "initial_candidates": 4,
    "initial_tokens": 12,
    "sensitivity_tokens": 18,
}
ALL = ("gptq", "sparse", "drop")
ROUNDED = ("gptq", "sparse4", "drop")
"""With layers that are both sparse and quantized."""
FIXED = 64 * 16 * 4 + 5 * 16 * 4
"""Bytes of the embedding and the norms."""
EVERYTHING = 2040
"""Bytes of all layers at two bits."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = prepare(tmp_path_factory.mktemp("joint"))
    context = StageContext(run, COMPUTE)
    for block in range(2):
        make_variants(context, "sparse", SparseGpt(sparsity=0.75, step=40, levels=2, patterns=("2:4",)), [block])
        make_variants(context, "sparse4", SparseGpt(bits=4, group_size=8, step=40, levels=2), [block])
        make_variants(context, "coarse", Gptq(bits=(2, 3, 4), group_size=None), [block])
    make_module_table(context, "drop", Drop())
    return run


@pytest.fixture
def run(prepared: Run, tmp_path: Path) -> Run:
    return fresh(prepared, tmp_path / "run")


def joint(size: int, variants: tuple[str, ...] = ALL, **options: object) -> Evolution:
    """A search for a model of which the layers take ``size`` bytes."""
    return Evolution(
        variants=variants, target=SizeTarget(bytes=FIXED + size), **{**SMALL, "start": "sensitivity", **options}
    )


def searched(run: Run, settings: Evolution | DynamicProgramming, name: str = "x") -> Configuration:
    search_with_effects(StageContext(run, COMPUTE), name, settings)
    return Configuration.read(run, name)


@pytest.mark.parametrize("start", ["uniform", "sensitivity"])
@pytest.mark.parametrize(
    ("variants", "size"),
    [
        (("gptq", "sparse"), 3600),
        (("gptq", "coarse"), 2300),
        (("gptq", "drop"), 1200),
        (ALL, 2000),
        (ALL, 700),
        (ROUNDED, 1500),
    ],
)
def test_the_size_is_kept_to_and_filled(run: Run, variants: tuple[str, ...], size: int, start: str) -> None:
    settings = joint(size, variants, start=start)
    found = searched(run, settings)
    total, problem = size_of(run, found.table).total_bytes, open_problem(run, settings, "searches.x")
    candidate = found.nearest(problem.space)
    assert problem.space.fits(candidate)
    assert total <= FIXED + size
    left = problem.space.budget - problem.space.cost_of(candidate)
    steps = step_costs(candidate, problem.space, traded(candidate, problem.space))
    free = problem.space.up[np.arange(len(candidate)), candidate][traded(candidate, problem.space)] >= 0
    assert (steps[free] > left).all()
    dropped = found.table[found.table["level"] == DROP]
    if not len(dropped) or not (dropped.groupby("block").size() == 2).any():  # norms of a block that is gone
        assert total == FIXED + size - left
    if size < EVERYTHING:
        assert len(dropped)
    of_layers = found.table[~of_modules(found.table)]
    assert set(of_layers["variants"]) <= set(variants) - {"drop"}
    kinds = ["attn" if "attn" in layer else "mlp" for layer in of_layers["layer"]]
    assert not set(zip(dropped["block"], dropped["layer"], strict=True)) & set(
        zip(of_layers["block"], kinds, strict=True)
    )


def test_dynamic_programming_chooses_from_all(run: Run) -> None:
    settings = DynamicProgramming(variants=ALL, target=SizeTarget(bytes=FIXED + 1200), errors="kl", tokens=24)
    found = searched(run, settings)
    assert size_of(run, found.table).total_bytes <= FIXED + 1200
    assert (found.table["level"] == DROP).any()


def test_a_search_starts_from_those_of_its_parts(run: Run) -> None:
    of_bits = Evolution(variants="gptq", target=SizeTarget(bytes=FIXED + 2500), **SMALL)
    part = searched(run, of_bits, "part")
    settings = joint(2500, start="uniform", start_from=("part",))
    problem = open_problem(run, settings, "searches.x")
    start = problem.earlier["part"]
    again = Configuration.of_candidate(problem, start).table
    again = again[~of_modules(again)].reset_index(drop=True)
    pd.testing.assert_frame_equal(again, part.table, check_dtype=False)
    searched(run, settings)
    trace = read_table(run.trace("x"), TRACE)
    assert (trace["generation"] == 0).sum() >= 2


OTHER = {"mixed": "sparse", "rounded": "sparse4", "dropping": "gptq"}
"""Variants that every other layer has, beside `gptq`."""


def exported(run: Run, *, chosen: str = "found") -> Configuration:
    """A configuration as folder and archive: what a search finds, or the first level of some variants.

    ``mixed`` takes two variants of layers by turns, and ``rounded`` others; ``dropping`` takes one, without the MLP of
    the first block.
    """
    settings = joint(1200, ROUNDED if chosen == "rounded" else ALL)
    searched(run, settings)
    if chosen != "found":
        problem = open_problem(run, settings, "searches.x")
        candidate = uniform_start(problem.space)
        for number, unit in enumerate(problem.space.units):
            sources = [level.source for level in unit.levels]
            if unit.modules:
                candidate[number] = chosen != "dropping" or (0, MLP) not in unit.modules
            else:
                candidate[number] = sources.index(OTHER[chosen] if number % 2 else "gptq")
        table = Configuration.of_candidate(problem, candidate).table
        settings_of_search = json.loads(settings.model_dump_json())
        write_table(table, run.configuration("x"), CONFIGURATION, provenance(settings_of_search))
    for exporter in (HuggingFace(), Archive()):
        run_export(StageContext(run, COMPUTE), "x", exporter)
    return Configuration.read(run, "x")


@pytest.mark.parametrize("chosen", ["found", "mixed", "rounded", "dropping"])
def test_the_folder_computes_what_was_chosen(run: Run, chosen: str) -> None:
    table = exported(run, chosen=chosen).table
    if chosen != "found":
        assert set(table["variants"]) == {"gptq", "drop", OTHER[chosen]}
    model = tiny_model()
    for row in table[~of_modules(table)].to_dict("records"):
        weight = VariantStore(run, row["variants"]).weight(row["block"], row["layer"], row["level"])
        model.get_submodule(row["unit"]).weight.data.copy_(weight)
    dropped = table[table["level"] == DROP]
    tokens = torch.arange(8)[None]
    with torch.no_grad(), without(model, list(zip(dropped["block"], dropped["layer"], strict=True))):
        expected = model(tokens).logits
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(run.export("x", "huggingface"))(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_archive_keeps_to_the_size_and_holds_the_same_model(run: Run) -> None:
    table = exported(run).table
    weights = load_archive(run.export("x", "archive") / ARCHIVE)
    folder = Checkpoint(run.export("x", "huggingface"))
    stored = folder.read(folder.names())
    assert weights.keys() == stored.keys()
    dropped = set(zip(*(table[table["level"] == DROP][key] for key in ("block", "layer")), strict=True))
    assert dropped
    for name, weight in weights.items():
        assert torch.equal(weight, stored[name]) or not weight.any()  # what a dropped module holds changes nothing
    model = AutoModelForCausalLM.from_pretrained(run.export("x", "huggingface"))
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        before = model(tokens).logits
        model.load_state_dict(weights, strict=False)
        torch.testing.assert_close(model(tokens).logits, before)
    payload = (run.export("x", "archive") / ARCHIVE).read_bytes()
    assert len(payload) - 8 - int.from_bytes(payload[:8], "little") <= FIXED + 1200


def test_the_archive_holds_sparse_integers_as_they_are_packed(run: Run) -> None:
    table = exported(run, chosen="rounded").table
    assert family_of(table) is MIXED
    assert {"bits", "sparsity-int4", "modules"} == set(table["family"])
    weights = load_archive(run.export("x", "archive") / ARCHIVE)
    folder = Checkpoint(run.export("x", "huggingface"))
    stored = folder.read(folder.names())
    assert weights.keys() == stored.keys() and all(torch.equal(weights[name], stored[name]) for name in weights)
    for row in table[table["variants"] == "sparse4"].to_dict("records"):
        weight = stored[f"{row['unit']}.weight"]
        kept = row["cost"]
        assert int(weight.count_nonzero()) <= kept == row["parameters"] - round(row["value"] * row["parameters"])
        groups = row["parameters"] // 8
        assert row["bytes"] == row["parameters"] // 8 + kept // 2 + groups * 2 + groups // 2
    payload = (run.export("x", "archive") / ARCHIVE).read_bytes()
    in_file = len(payload) - 8 - int.from_bytes(payload[:8], "little")
    assert in_file == FIXED + table[~of_modules(table)]["bytes"].sum()


@pytest.mark.parametrize("target", [0.5, SizeTarget(bytes=FIXED + 2500)])
def test_sparse_integers_alone_reach_a_sparsity_or_a_size(run: Run, target: float | SizeTarget) -> None:
    table = searched(run, Evolution(variants="sparse4", target=target, group_rule="none", **SMALL)).table
    size = size_of(run, table)
    if isinstance(target, SizeTarget):
        assert size.total_bytes <= FIXED + 2500
    else:
        assert table["cost"].sum() == table["parameters"].sum() // 2
        assert size.family is not None and size.family.title(size.average) == "at 50.0% sparsity and 4 bits"
        assert size.bits == 2  # half of the weights have four
    assert size.total_bytes == FIXED + table["bytes"].sum()


@pytest.mark.parametrize("family", [MIXED, BITS])
def test_card_and_report_show_family_and_level(run: Run, family: Family) -> None:
    table = exported(run, chosen="mixed" if family is MIXED else "dropping").table
    assert family_of(table) is family
    for model in ("dense", "x"):
        measure(run, model, 10.0, 0.0, 0.9)
    card = render_card(run, "x", HuggingFace(), CardFacts())
    write_report(StageContext(run), ["x"])
    page = run.report.read_text()
    if family is MIXED:
        for row in table[~of_modules(table)].to_dict("records"):
            assert f" {row['variants']} {row['level']} |" in card
        assert "Letters stand for variants: a is gptq, b is sparse." in page
        assert "stored bits" in page
        return
    assert (table["level"] == DROP).sum() == 1
    assert card.count("| drop ") == 3  # layers of an MLP
    assert "Modules dropped: 1." in page
    assert GONE in page  # the colour of layers of dropped modules


def test_a_killed_search_goes_on_to_the_same_bytes(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, other = joint(1200), fresh(run, tmp_path / "other")
    searched(run, settings)
    original, rounds = Evolution.next_round, []

    def dies(self: Evolution, state: State, *rest: object) -> object:
        if len(rounds) == 3:
            raise KeyboardInterrupt
        rounds.append(state)
        return original(self, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Evolution, "next_round", dies)
        with pytest.raises(KeyboardInterrupt):
            searched(other, settings)
    searched(other, settings)
    for path in ("configuration", "trace"):
        assert getattr(run, path)("x").read_bytes() == getattr(other, path)("x").read_bytes()


def test_two_processes_find_what_one_finds(run: Run, tmp_path: Path) -> None:
    other = fresh(run, tmp_path / "other")
    settings = joint(1200, generations=2)
    own = searched(run, settings)
    two = StageContext(other, COMPUTE.model_copy(update={"processes": 2}))
    search_with_effects(two, "x", settings)
    assert Configuration.read(other, "x").table.equals(own.table)


@pytest.mark.parametrize("share", [0.8, 0.7])
@pytest.mark.parametrize("start", ["uniform", "sensitivity", "dp"])
def test_a_bound_on_multiply_adds_holds_beside_the_size(
    run: Run, start: str, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    target = SizeTarget(bytes=FIXED + 2500, multiply_adds=share)
    settings: Evolution | DynamicProgramming = Evolution(variants=ALL, target=target, **SMALL)
    if start == "dp":
        settings = DynamicProgramming(variants=ALL, target=target, errors="kl", tokens=24)
    elif start == "sensitivity":
        settings = settings.model_copy(update={"start": start})
    with caplog.at_level("INFO"):
        found = searched(run, settings)
    assert size_of(run, found.table).total_bytes <= FIXED + 2500
    layers, head = read_table(run.layers, LAYERS), 64 * 16
    dropped = found.table[found.table["level"] == DROP]
    gone = pd.MultiIndex.from_frame(dropped[["block", "layer"]])
    in_use = int(layers["parameters"][~pd.MultiIndex.from_frame(layers[["block", "module"]]).isin(gone)].sum()) + head
    dense = int(layers["parameters"].sum()) + head
    assert len(dropped) and in_use <= share * dense
    assert f"{in_use / dense:.4g} of the multiply-adds" in caplog.text


def test_a_bound_that_only_an_empty_model_would_keep_is_refused(run: Run) -> None:
    target = SizeTarget(bytes=FIXED + 2500, multiply_adds=0.2)
    with pytest.raises(ConfigError, match=r"searches\.x\.target\.multiply_adds: 0\.2 .* give at least 0\.\d+"):
        open_problem(run, Evolution(variants=ALL, target=target, **SMALL), "searches.x")


def test_a_size_that_no_mix_reaches_is_refused_with_the_range(run: Run) -> None:
    for size, side in ((100, "below the smallest file"), (99_000, "above the largest file")):
        with pytest.raises(ConfigError, match=rf"searches.x.target: .* is {side} \([\d.]+ MB\)"):
            open_problem(run, joint(size), "searches.x")


def test_modules_of_other_blocks_than_the_layers_are_refused(run: Run) -> None:
    tables = {name: open_variants(run, [name], Constraints("searches.x")) for name in ("gptq", "drop")}
    modules = tables["drop"].modules
    assert modules is not None and tables["gptq"].store is not None
    modules["name"] = modules["name"].str.replace("model.layers", "transformer.h")
    layers = tables["gptq"].store.table
    with pytest.raises(ConfigError, match=r"'transformer\.h\.0\.attn', and block 0 is 'model\.layers\.0'"):
        problem_of({"gptq": layers, "drop": modules}, Constraints("searches.x"))
