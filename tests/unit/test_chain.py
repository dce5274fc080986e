"""Variants in a chain: each block is calibrated on what the compressed blocks before it return."""

import architectures
import pytest
import torch
from test_hessian import SEQUENCES, expected_hessians, prepare

from evopress.artifacts.paths import Run, manifest_path
from evopress.artifacts.tables import TOKENS, read_provenance, read_table, write_table
from evopress.artifacts.tensors import read_manifest, read_tensors
from evopress.cli import verify
from evopress.compression import hessian, sequential
from evopress.compression.base import LayerMethod
from evopress.compression.formats import decode
from evopress.compression.methods.gptq import Gptq
from evopress.compression.methods.pruning import Wanda
from evopress.compression.sequential import make_sequential_variants
from evopress.compression.store import VariantStore
from evopress.config.context import ComputeSettings, StageContext
from evopress.models.structure import layer_table
from evopress.util.errors import ArtifactError, CompressionError

CPU = ComputeSettings(device="cpu")
BLOCKS = 3
PRUNED = Wanda(step=100, levels=1, propagation="sequential", propagation_level="+1")
QUANTIZED = Gptq(bits=(2, 4), group_size=16, propagation="sequential", propagation_level="2")


def make_all(run: Run, settings: LayerMethod, name: str = "c") -> VariantStore:
    for block in range(BLOCKS):
        make_sequential_variants(StageContext(run, CPU), name, settings, [block])
    return VariantStore(run, name)


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "bloom"])  # the last takes one sequence at a time
def test_hessians_are_those_of_the_model_compressed_so_far(name, tmp_path, monkeypatch):
    """Against full forward passes of a model whose weights are replaced block by block.

    Wanda keeps weights as they are and compares norms only, so the very same ones must be chosen.
    """
    model = architectures.build(name)
    run = prepare(tmp_path / "run", model)
    monkeypatch.setattr(hessian, "TOKENS_AT_ONCE", 2 * architectures.LENGTH)
    store = make_all(run, PRUNED)
    for block, rows in layer_table(model).groupby("block"):
        hessians = expected_hessians(model, architectures.tokens(SEQUENCES))
        for row in rows.itertuples():
            weight = model.get_submodule(row.name).weight
            for variant in PRUNED.compress({row.layer: weight.clone()}, hessians[row.name].float()):
                expected = decode(variant.format, variant.parts, weight.shape, torch.float32)
                assert torch.equal(store.weight(block, row.layer, variant.level), expected)
        for row in rows.itertuples():
            model.get_submodule(row.name).weight.copy_(store.weight(block, row.layer, "+1"))


def test_the_state_between_jobs_is_the_compressed_model_s(tmp_path):
    model = architectures.build("llama")
    run = prepare(tmp_path / "run", model)
    store = make_all(run, QUANTIZED)
    for row in layer_table(model).itertuples():
        model.get_submodule(row.name).weight.copy_(store.weight(row.block, row.layer, "2"))
    states = model(architectures.tokens(SEQUENCES), output_hidden_states=True).hidden_states
    for block in range(BLOCKS - 1):
        found = read_tensors(run.chain_state("c", block))["hidden"]
        torch.testing.assert_close(found, states[block + 1], rtol=1e-4, atol=1e-4)
    assert len(read_tensors(run.chain_state("c", BLOCKS - 1))["hidden"]) == 0  # nothing comes after


def test_all_levels_are_made_and_the_manifest_tells_of_the_chain(tmp_path):
    run = prepare(tmp_path / "run", architectures.build("llama"))
    store = make_all(run, QUANTIZED)
    assert set(store.table["level"]) == {"2", "4"}
    facts = read_manifest(run.variant_tensors("c", 1))["facts"]
    assert facts["hessians"] == {"calibration": {"source": "x"}, "propagation": "sequential"}
    assert facts["tokens"] == SEQUENCES * architectures.LENGTH
    assert not run.hessian(0).exists()


def test_excluded_layers_run_dense(tmp_path):
    """With all layers excluded but those of the last block, it sees the dense model."""
    model = architectures.build("llama")
    run = prepare(tmp_path / "run", model)
    settings = PRUNED.model_copy(update={"exclude": ("*.layers.0.*", "*.layers.1.*")})
    store = make_all(run, settings)
    hessians = expected_hessians(model, architectures.tokens(SEQUENCES))
    name = "model.layers.2.mlp.down_proj"
    weight = model.get_submodule(name).weight.clone()
    dense = {v.level: v for v in PRUNED.compress({"mlp.down_proj": weight}, hessians[name].float())}
    expected = decode(dense["0"].format, dense["0"].parts, weight.shape, torch.float32)
    assert torch.equal(store.weight(2, "mlp.down_proj", "0"), expected)
    assert set(store.table["block"]) == {2}


def test_a_layer_without_room_for_the_level_is_named(tmp_path):
    run = prepare(tmp_path / "run", architectures.build("llama"))
    settings = PRUNED.model_copy(update={"step": 600})
    with pytest.raises(CompressionError, match=r"k_proj.*no room for the propagation_level \+1; .*\(0\)"):
        make_sequential_variants(StageContext(run, CPU), "c", settings, [0])
    assert not run.variant_tensors("c", 0).exists()


def test_a_state_of_another_chain_is_refused(tmp_path):
    run = prepare(tmp_path / "run", architectures.build("llama"))
    make_sequential_variants(StageContext(run, CPU), "c", PRUNED, [0])
    with pytest.raises(ArtifactError, match=r"chain/block_000\.safetensors: belongs to .*other settings"):
        make_sequential_variants(StageContext(run, CPU), "c", PRUNED.model_copy(update={"propagation_level": "0"}), [1])
    tokens = read_table(run.tokens("calibration"), TOKENS)
    write_table(tokens[1:], run.tokens("calibration"), TOKENS, read_provenance(run.tokens("calibration")))
    with pytest.raises(ArtifactError, match="other tokens"):
        make_sequential_variants(StageContext(run, CPU), "c", PRUNED, [1])


def test_a_state_that_is_missing_or_cut_short_is_named(tmp_path):
    run = prepare(tmp_path / "run", architectures.build("llama"))
    with pytest.raises(ArtifactError, match=r"chain/block_000.*missing"):
        make_sequential_variants(StageContext(run, CPU), "c", PRUNED, [1])
    make_sequential_variants(StageContext(run, CPU), "c", PRUNED, [0])
    path = run.chain_state("c", 0)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ArtifactError, match=r"chain/block_000.*damaged"):
        make_sequential_variants(StageContext(run, CPU), "c", PRUNED, [1])
    assert not manifest_path(run.variant_tensors("c", 1)).exists()


def test_verify_does_not_miss_states_that_were_removed_after_use(tmp_path):
    run = prepare(tmp_path / "run", architectures.build("llama"))
    make_sequential_variants(StageContext(run, CPU), "c", PRUNED, [0])
    state = run.chain_state("c", 0)
    tensors = [path for path, check in verify.checks_of(run) if path == state and not list(check(path))]
    assert tensors == [state]
    state.unlink()  # as Snakemake does; the manifest stays
    assert manifest_path(state).exists()
    assert state not in dict(verify.checks_of(run))


def test_inputs_that_are_not_finite_name_the_layer(tmp_path):
    model = architectures.build("llama")
    model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    run = prepare(tmp_path / "run", model)
    make_sequential_variants(StageContext(run, CPU), "c", PRUNED, [0])
    with pytest.raises(CompressionError, match=r"model\.layers\.1\.mlp\.down_proj: NaN or infinity"):
        make_sequential_variants(StageContext(run, CPU), "c", PRUNED, [1])


@pytest.mark.parametrize("killed_at", [None, 0, 1, 2])
def test_one_job_of_all_blocks_ends_as_jobs_of_one_do_whenever_it_is_killed(killed_at, tmp_path, monkeypatch):
    apart, together = (prepare(tmp_path / name, architectures.build("llama")) for name in ("apart", "together"))
    make_all(apart, QUANTIZED)
    compress, made = sequential.compress_layers, []

    def counted(context, description, *arguments):
        if len(made) == killed_at:
            raise KeyboardInterrupt
        made.append(description)
        return compress(context, description, *arguments)

    if killed_at is not None:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(sequential, "compress_layers", counted)
            make_sequential_variants(StageContext(together, CPU), "c", QUANTIZED, list(range(BLOCKS)))
        assert not together.variant_table("c", 0).exists()
        killed_at = None
    monkeypatch.setattr(sequential, "compress_layers", counted)
    make_sequential_variants(StageContext(together, CPU), "c", QUANTIZED, list(range(BLOCKS)))
    assert made == [f"variants c, block {block}" for block in range(BLOCKS)]  # each once
    assert contents(together) == contents(apart)


def contents(run: Run) -> dict[str, bytes]:
    """Every file of the variants `c`, by its path."""
    folder = run.variant_table("c", 0).parent
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
