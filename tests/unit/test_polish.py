"""The polish: the chosen levels made once more, each block calibrated on what the polished ones before it return."""

from collections.abc import Callable
from pathlib import Path

import architectures
import numpy as np
import pandas as pd
import pytest
import torch
from test_hessian import SEQUENCES, expected_hessians, prepare
from torch import Tensor

from evopress.artifacts.manifest import set_aside
from evopress.artifacts.paths import Run, manifest_path
from evopress.artifacts.provenance import Provenance
from evopress.artifacts.tables import CONFIGURATION, EFFORT, LAYERS, TOKENS, read_provenance, read_table, write_table
from evopress.cli.commands import main
from evopress.compression import hessian
from evopress.compression.base import LayerMethod
from evopress.compression.block_files import variant_table, write_variants
from evopress.compression.formats import decode
from evopress.compression.layers import layer_shapes
from evopress.compression.methods.gguf import Gguf
from evopress.compression.methods.gptq import Gptq
from evopress.compression.methods.pruning import SparseGpt, Wanda
from evopress.compression.stage import compress_layers
from evopress.compression.store import VariantStore
from evopress.config.context import ComputeSettings, StageContext
from evopress.export.base import Exporter
from evopress.export.compressed import CompressedModel
from evopress.export.exporters.archive import ARCHIVE, Archive, load_archive
from evopress.export.stage import run_export
from evopress.models.structure import layer_table
from evopress.search import polish as stage
from evopress.search.polish import polish
from evopress.util.errors import ArtifactError, CompressionError, DamagedError

CPU = ComputeSettings(device="cpu")
PRUNED = Wanda(step=100, levels=1)
QUANTIZED = Gptq(bits=(2, 3, 4), group_size=16)


def choose(run: Run, method: LayerMethod, search: str = "evo", without: str = "nothing") -> dict[str, str]:
    """A configuration in which levels go round; returns the level of each layer by its name."""
    rows, chosen = [], {}
    for number, shape in enumerate(layer_shapes(read_table(run.layers, LAYERS), itemsize=4)):
        levels = method.levels_of(shape)
        level = levels[(number + shape.block) % len(levels)]
        if shape.layer.endswith(without):
            continue
        chosen[shape.name] = level.label
        where = {"unit": shape.name, "block": shape.block, "layer": shape.layer, "variants": "v"}
        cost = {"cost": level.cost, "parameters": shape.parameters, "bytes": level.bytes}
        rows.append({**where, "family": method.family.name, "level": level.label, "value": level.value, **cost})
    frame = pd.DataFrame(rows, columns=CONFIGURATION.names)
    write_table(frame, run.configuration(search), CONFIGURATION, Provenance("search", '{"strategy": "x"}', "abc"))
    return chosen


def polished(run: Run, how: str, method: LayerMethod, search: str = "evo") -> VariantStore:
    polish(StageContext(run, CPU), search, how, method)  # type: ignore[arg-type]
    return VariantStore(run, "v", polished=search)


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_each_block_sees_the_polished_ones_before_it_whatever_their_levels(name, tmp_path, monkeypatch):
    """Against full forward passes of a model whose weights are replaced block by block.

    Wanda keeps weights as they are and compares norms only, so the very same ones must be chosen.
    """
    model = architectures.build(name)
    run = prepare(tmp_path / "run", model)
    monkeypatch.setattr(hessian, "TOKENS_AT_ONCE", 2 * architectures.LENGTH)
    chosen = choose(run, PRUNED, without="v_proj")
    assert len(set(chosen.values())) == 3
    store = polished(run, "sequential", PRUNED)
    assert dict(zip(store.table["name"], store.table["level"], strict=True)) == chosen
    for _, rows in layer_table(model).groupby("block"):
        hessians = expected_hessians(model, architectures.tokens(SEQUENCES))
        for row in rows[rows["name"].isin(chosen)].itertuples():
            weight = model.get_submodule(row.name).weight
            level = chosen[row.name]
            made = PRUNED.compress({row.layer: weight.clone()}, hessians[row.name].float())
            variant = next(each for each in made if each.level == level)
            expected = decode(variant.format, variant.parts, weight.shape, torch.float32)
            assert torch.equal(store.weight(row.block, row.layer, level), expected)
        for row in rows[rows["name"].isin(chosen)].itertuples():
            model.get_submodule(row.name).weight.copy_(store.weight(row.block, row.layer, chosen[row.name]))


def inputs_of(model, tokens: Tensor) -> dict[str, Tensor]:
    """Inputs of every linear layer, float64 [tokens, columns], from one plain forward pass."""
    found: dict[str, Tensor] = {}

    def gather(name: str) -> Callable[..., None]:
        return lambda module, args: found.update({name: args[0].flatten(0, -2).double()})

    names = layer_table(model)["name"]
    handles = [model.get_submodule(name).register_forward_pre_hook(gather(name)) for name in names]
    model(tokens)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_asymmetric_aims_at_the_outputs_of_the_dense_model(name, tmp_path):
    """Against least squares on the inputs of both models, with rows for the damping, one input group after another."""
    model, dense = architectures.build(name), architectures.build(name)
    run = prepare(tmp_path / "run", model)
    chosen = choose(run, PRUNED)
    store = polished(run, "asymmetric", PRUNED)
    tokens = architectures.tokens(SEQUENCES)
    wanted = inputs_of(dense, tokens)
    moved = 0.0
    for (block, _), rows in layer_table(model).groupby(["block", "input_group"], sort=False):
        given, hessians = inputs_of(model, tokens), expected_hessians(model, tokens)
        for row in rows.itertuples():
            weight, x = dense.get_submodule(row.name).weight.double(), given[row.name]
            diagonal = (x.t() @ x).diagonal()
            shift = (0.01 * diagonal[diagonal != 0].mean()).sqrt() * torch.eye(row.columns).double()
            outputs = torch.cat([wanted[row.name] @ weight.t(), shift @ weight.t()])
            target = torch.linalg.lstsq(torch.cat([x, shift]), outputs).solution.t().float()
            moved += float((target - weight).abs().max()) if block else 0.0
            made = PRUNED.compress({row.layer: target}, hessians[row.name].float())
            variant = next(each for each in made if each.level == chosen[row.name])
            expected = decode(variant.format, variant.parts, target.shape, torch.float32)
            found = store.weight(block, row.layer, chosen[row.name])
            assert ((found == 0) == (expected == 0)).float().mean() > 0.98  # scores may tie within rounding
            torch.testing.assert_close(
                found[(found != 0) & (expected != 0)], expected[(found != 0) & (expected != 0)], rtol=1e-3, atol=1e-4
            )
        for row in rows.itertuples():
            model.get_submodule(row.name).weight.copy_(store.weight(block, row.layer, chosen[row.name]))
    assert moved > 0.01


@pytest.mark.parametrize("how", ["sequential", "asymmetric"])
@pytest.mark.parametrize(
    "method",
    [
        QUANTIZED,
        SparseGpt(step=100, levels=2),
        SparseGpt(patterns=("2:4", "1:4")),
        SparseGpt(bits=4, group_size=16, step=100, levels=2),
        Gguf(embedding=False, types=("Q4_0", "Q5_0", "Q8_0")),
        Gguf(embedding=False, types=("Q4_0", "Q8_0"), rounding="rtn"),
    ],
    ids=["gptq", "sparsegpt", "patterns", "sparse-int4", "gguf", "gguf-rtn"],
)
def test_levels_and_sizes_stay(method, how, tmp_path, monkeypatch):
    run = prepare(tmp_path / "run", wide(monkeypatch))
    chosen = choose(run, method)
    store = polished(run, how, method)
    assert dict(zip(store.table["name"], store.table["level"], strict=True)) == chosen
    configuration = read_table(run.configuration("evo"), CONFIGURATION)
    assert store.table["bytes"].tolist() == configuration["bytes"].tolist()
    assert read_table(run.polish_effort("evo"), EFFORT)["tokens"].tolist() == [SEQUENCES * architectures.LENGTH]
    assert not run.polish_state("evo").parent.exists()


def wide(monkeypatch):
    """A model whose layers GGUF types and groups of 16 fit."""
    name, sizes = architectures.CONFIGS["llama"]
    monkeypatch.setitem(architectures.CONFIGS, "llama-wide", (name, {**sizes, "intermediate_size": 64}))
    return architectures.build("llama-wide")


@pytest.mark.parametrize("method", [QUANTIZED, SparseGpt(step=100, levels=2)], ids=["gptq", "sparsegpt"])
def test_asymmetric_brings_outputs_nearer_to_those_of_the_dense_model(method, tmp_path, monkeypatch):
    """Of the first layers of block 1, given what the block before makes of its own."""
    model, tokens = wide(monkeypatch), architectures.tokens(SEQUENCES)
    run = prepare(tmp_path / "run", model)
    chosen, wanted, layers = choose(run, method), inputs_of(model, tokens), layer_table(model)
    first = layers[(layers["block"] == 1) & (layers["input_group"] == "self_attn.q_proj")]
    weights = {name: model.get_submodule(name).weight.double() for name in layers["name"]}
    errors = []
    for how in ("sequential", "asymmetric"):
        store = polished(run, how, method)
        for row in layers[layers["block"] == 0].itertuples():
            model.get_submodule(row.name).weight.copy_(store.weight(0, row.layer, chosen[row.name]))
        given, error = inputs_of(model, tokens), 0.0
        for row in first.itertuples():
            found = store.weight(1, row.layer, chosen[row.name]).double()
            outputs = wanted[row.name] @ weights[row.name].t()
            error += float((given[row.name] @ found.t() - outputs).square().sum())
        errors.append(error)
    assert errors[1] < 0.9 * errors[0]


# --- kills and changes -----------------------------------------------------------------------------------------------


def files_of(run: Run) -> dict[str, bytes]:
    """What a polish leaves, but for the seconds that it took."""
    folder = run.polish_effort("evo").parent
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.stem != "effort"}


def interrupt_at(monkeypatch: pytest.MonkeyPatch, block: int, *, before: bool = True) -> None:
    """Let the next polish end at a block: before it is written, or after, before its state is."""
    write = stage.write_packed

    def interrupted(tensors: Path, *rest: object) -> None:
        last = tensors.name == f"block_{block:03d}.safetensors"
        if not (last and before):
            write(tensors, *rest)  # type: ignore[arg-type]
        if last:
            raise KeyboardInterrupt

    monkeypatch.setattr(stage, "write_packed", interrupted)


@pytest.mark.parametrize("how", ["sequential", "asymmetric"])
@pytest.mark.parametrize(("block", "before"), [(0, False), (1, True), (2, False)])
def test_a_killed_polish_goes_on_and_ends_with_the_same_bytes(block, before, how, tmp_path, monkeypatch):
    whole, run = (prepare(tmp_path / name, architectures.build("llama")) for name in ("whole", "killed"))
    for each in (whole, run):
        choose(each, QUANTIZED)
    polished(whole, how, QUANTIZED)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, block, before=before)
        polished(run, how, QUANTIZED)
    assert not run.polish_effort("evo").exists()
    times = {number: run.polished_tensors("evo", number).stat().st_mtime_ns for number in range(block)}
    polished(run, how, QUANTIZED)
    assert files_of(run) == files_of(whole)
    assert {number: run.polished_tensors("evo", number).stat().st_mtime_ns for number in times} == times


def spoil_state(run: Run) -> None:
    path = run.polish_state("evo")
    path.write_bytes(path.read_bytes()[:-8])


def spoil_block(run: Run) -> None:
    path = run.polished_tensors("evo", 0)
    path.write_bytes(path.read_bytes()[:-8])


def other_levels(run: Run) -> None:
    table = read_table(run.configuration("evo"), CONFIGURATION)
    made = read_provenance(run.configuration("evo"))
    small = table.assign(level="2", value=2.0, cost=2 * table["parameters"])
    shapes = {shape.name: shape for shape in layer_shapes(read_table(run.layers, LAYERS), itemsize=4)}
    small["bytes"] = [QUANTIZED.levels_of(shapes[name])[0].bytes for name in small["unit"]]
    write_table(small, run.configuration("evo"), CONFIGURATION, made)


def other_tokens(run: Run) -> None:
    tokens = read_table(run.tokens("calibration"), TOKENS)
    write_table(tokens[::-1], run.tokens("calibration"), TOKENS, read_provenance(run.tokens("calibration")))


@pytest.mark.parametrize("change", [spoil_state, spoil_block, other_levels, other_tokens])
def test_what_a_killed_polish_left_of_something_else_is_not_taken(change, tmp_path, monkeypatch):
    whole, run = (prepare(tmp_path / name, architectures.build("llama")) for name in ("whole", "killed"))
    for each in (whole, run):
        choose(each, QUANTIZED)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 2)
        polished(run, "asymmetric", QUANTIZED)
    change(run)
    if change in (other_levels, other_tokens):
        change(whole)
    polished(whole, "asymmetric", QUANTIZED)
    polished(run, "asymmetric", QUANTIZED)
    assert files_of(run) == files_of(whole)


def test_another_way_makes_all_blocks_anew(tmp_path):
    run = prepare(tmp_path / "run", architectures.build("llama"))
    choose(run, QUANTIZED)
    polished(run, "sequential", QUANTIZED)
    before = files_of(run)
    polished(run, "asymmetric", QUANTIZED)
    after = files_of(run)
    assert before["block_001.safetensors"] != after["block_001.safetensors"]
    recorded = {read_provenance(run.polished_table("evo", block)).settings for block in range(3)}
    assert len(recorded) == 1 and '"polish": "asymmetric"' in recorded.pop()


def test_levels_that_the_method_does_not_make_are_named(tmp_path):
    run = prepare(tmp_path / "run", architectures.build("llama"))
    choose(run, Gptq(bits=(5,), group_size=16))
    with pytest.raises(CompressionError, match=r"layers\.0\..*q_proj: gptq .* makes no level 5"):
        polished(run, "sequential", QUANTIZED)


def test_levels_of_another_size_are_refused(tmp_path):
    run = prepare(tmp_path / "run", architectures.build("llama"))
    choose(run, QUANTIZED)
    with pytest.raises(CompressionError, match=r"takes \d+ bytes at level .*, and \d+ before it was polished"):
        polished(run, "sequential", Gptq(bits=(2, 3, 4), group_size=8))
    assert not run.polished_tensors("evo", 0).exists()


# --- what is exported ------------------------------------------------------------------------------------------------


class Recorder(Exporter):
    """Keeps what any exporter is given."""

    exporter: str = "recorder"

    def write(self, context: StageContext, search: str, folder: Path) -> None:
        model = CompressedModel(context, search)
        for name, dense in model.checkpoint.read(list(model.choices)).items():
            np.save(folder / f"{name}.npy", model.weight(name, dense).numpy())


def test_every_exporter_is_given_what_was_polished_and_only_if_asked(tmp_path):
    model = architectures.build("llama")
    run = prepare(tmp_path / "run", model)
    chosen = choose(run, QUANTIZED)
    hessians = expected_hessians(model, architectures.tokens(SEQUENCES))
    store = polished(run, "asymmetric", QUANTIZED)
    context = StageContext(run, CPU)
    made_dense(run, hessians)
    variants = VariantStore(run, "v")
    for how, expected in (("none", variants), ("asymmetric", store)):
        run_export(context, "evo", Recorder(), how)  # type: ignore[arg-type]
        run_export(context, "evo", Archive(), how)  # type: ignore[arg-type]
        unpacked = load_archive(run.export("evo", "archive") / ARCHIVE)
        for row in store.table.itertuples():
            weight = expected.weight(row.block, row.layer, chosen[row.name])
            found = np.load(run.export("evo", "recorder") / f"{row.name}.weight.npy")
            assert torch.equal(torch.from_numpy(found), weight)
            assert torch.equal(unpacked[f"{row.name}.weight"], weight)
    row = store.table.iloc[-1]
    where = int(row["block"]), row["layer"], row["level"]
    assert not torch.equal(variants.weight(*where), store.weight(*where))


def made_dense(run: Run, hessians: dict[str, Tensor]) -> None:
    """The variants `v`, from these Hessians."""
    layers = read_table(run.layers, LAYERS)
    for block, own in layers.groupby("block"):
        members = own.set_index("layer")["name"]
        made = compress_layers(
            StageContext(run, CPU), "v", QUANTIZED, own, lambda group, of=members: hessians[of[group]].float()
        )
        table = variant_table(made, own, QUANTIZED)
        write_variants(run, "v", int(block), made, table, Provenance("variants", "{}", "abc"), {})


def test_a_damaged_or_missing_block_is_told_and_remade_by_the_next_run(tmp_path, capsys):
    run = prepare(tmp_path / "run", architectures.build("llama"))
    choose(run, QUANTIZED)
    polished(run, "sequential", QUANTIZED)
    whole, effort = files_of(run), run.polish_effort("evo")
    tensors, table = run.polished_tensors("evo", 1), run.polished_table("evo", 1)

    def flip(path):
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)

    def remove_all():
        for path in (tensors, manifest_path(tensors), table):
            path.unlink()

    for damage, named in (
        (lambda: flip(tensors), tensors),  # its header is whole: only its digests tell
        (lambda: tensors.write_bytes(whole[tensors.name][:-8]), tensors),
        (lambda: flip(table), table),
        (manifest_path(tensors).unlink, tensors),
        (remove_all, tensors),
    ):
        damage()
        main(["verify", str(run.root)])
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(str(effort.parent))]
        assert any(line.startswith(str(named.with_suffix(""))) for line in lines)
        assert all(": damaged (" in line and str(effort) in line for line in lines)
        with pytest.raises(DamagedError, match=r"polished/block_001\.\w+: damaged") as told:
            run_export(StageContext(run, CPU), "evo", Archive(), "sequential")
        assert "run again to remake it (what is left of it: " in set_aside(told.value)
        assert not effort.exists(), "the output of the rule, without which Snakemake runs it"
        polished(run, "sequential", QUANTIZED)
        assert {name: content for name, content in files_of(run).items() if not name.endswith(".damaged")} == whole
        run_export(StageContext(run, CPU), "evo", Archive(), "sequential")


def test_a_polish_that_is_missing_or_of_another_model_is_not_exported(tmp_path):
    run = prepare(tmp_path / "run", architectures.build("llama"))
    choose(run, QUANTIZED)
    with pytest.raises(ArtifactError, match=r"polished/block_000\.parquet: missing"):
        run_export(StageContext(run, CPU), "evo", Recorder(), "sequential")
    polished(run, "sequential", QUANTIZED)
    path = run.polished_tensors("evo", 1)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ArtifactError, match=r"polished/block_001\.safetensors: damaged"):
        run_export(StageContext(run, CPU), "evo", Recorder(), "sequential")
