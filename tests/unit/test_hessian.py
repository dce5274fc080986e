"""The Hessians stage: sums over tokens of every distinct layer input of the dense model."""

from pathlib import Path

import architectures
import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from evopress.artifacts.atomic import write_text
from evopress.artifacts.paths import Run, manifest_path
from evopress.artifacts.provenance import Provenance
from evopress.artifacts.tables import LAYERS, TOKENS, write_table
from evopress.artifacts.tensors import read_manifest, read_tensors
from evopress.compression import hessian
from evopress.compression.hessian import accumulate, accumulate_hessians, sum_hessians, symmetrize
from evopress.config.context import ComputeSettings, StageContext
from evopress.config.data import HessianSettings
from evopress.models.structure import layer_table
from evopress.util.errors import ArtifactError, CompressionError, ConfigError

CPU = ComputeSettings(device="cpu")
SEQUENCES = 5


def prepare(root: Path, model, sequences: int = SEQUENCES) -> Run:
    """A results folder up to the calibration tokens."""
    run = Run(root)
    architectures.save(model, run.model)
    write_text(run.model_manifest, '{"fingerprint": "abc"}')
    write_table(layer_table(model), run.layers, LAYERS, Provenance("model", "{}", "abc"))
    rows = [row.astype(np.int32) for row in architectures.tokens(sequences).numpy()]
    frame = pd.DataFrame({"sequence": range(sequences), "documents": [["d"]] * sequences, "tokens": rows})
    frame["starts"] = [[]] * sequences
    write_table(frame, run.tokens("calibration"), TOKENS, Provenance("calibration", '{"source": "x"}', "abc"))
    return run


def expected_hessians(model, tokens: Tensor) -> dict[str, Tensor]:
    """X^T X of every linear layer of the model, in float64, from one plain forward pass."""
    sums: dict[str, Tensor] = {}

    def observe(name: str):
        def hook(module, args):
            x = args[0].flatten(0, -2).double()
            sums[name] = sums.get(name, 0) + x.t() @ x

        return hook

    layers = layer_table(model)["name"]
    handles = [model.get_submodule(name).register_forward_pre_hook(observe(name)) for name in layers]
    model(tokens)
    for handle in handles:
        handle.remove()
    return sums


@pytest.mark.parametrize("columns", [3, 40])
def test_accumulate_sums_outer_products(columns, monkeypatch):
    monkeypatch.setattr(hessian, "_PANEL", 16)
    inputs = torch.randn(2, 7, columns)
    total = torch.zeros(columns, columns)
    accumulate(total, inputs[:1])
    accumulate(total, inputs[1:])
    x = inputs.flatten(0, 1).double()
    assert torch.allclose(symmetrize(total).double(), x.t() @ x, atol=1e-4)


def test_half_precision_inputs_are_multiplied_in_float32():
    inputs = torch.full((4096, 1), 1.0, dtype=torch.bfloat16)
    total = torch.zeros(1, 1)
    accumulate(total, inputs)
    accumulate(total, inputs[:1])
    assert float(total) == 4097  # bfloat16 would round this to 4096


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "phi3"])
def test_equals_a_plain_forward_pass(name, tmp_path, monkeypatch):
    model = architectures.build(name)
    run = prepare(tmp_path / "run", model)
    monkeypatch.setattr(hessian, "TOKENS_AT_ONCE", 2 * architectures.LENGTH)  # chunks of 2, 2 and 1 sequences
    accumulate_hessians(StageContext(run, CPU), HessianSettings(), 0)
    expected = expected_hessians(model, architectures.tokens(SEQUENCES))
    layers = layer_table(model)
    for block, rows in layers.groupby("block"):
        found = read_tensors(run.hessian(block))
        assert set(found) == set(rows["input_group"])
        for row in rows.itertuples():  # those that share an input must each agree with the one that is kept
            value = found[row.input_group]
            assert value.dtype == torch.float32
            assert torch.equal(value, value.t())
            assert torch.allclose(value.double(), expected[row.name], rtol=1e-4, atol=1e-3)
        assert read_manifest(run.hessian(block))["facts"] == {"tokens": 60, "sequences": 5}


def test_shards_add_up(tmp_path):
    model = architectures.build("llama")
    whole, sharded = prepare(tmp_path / "whole", model), prepare(tmp_path / "sharded", model)
    accumulate_hessians(StageContext(whole, CPU), HessianSettings(), 0)
    for shard in range(3):
        accumulate_hessians(StageContext(sharded, CPU), HessianSettings(shards=3), shard)
    assert not sharded.hessian(0).exists()
    sum_hessians(sharded, 0, 3)
    one, other = read_tensors(whole.hessian(0)), read_tensors(sharded.hessian(0))
    assert one.keys() == other.keys()
    for name in one:
        assert torch.allclose(one[name], other[name], rtol=1e-5, atol=1e-4)
    assert read_manifest(sharded.hessian(0))["facts"] == {"tokens": 60, "sequences": 5}


def test_shards_of_other_settings_are_refused(tmp_path):
    run = prepare(tmp_path / "run", architectures.build("llama"))
    accumulate_hessians(StageContext(run, CPU), HessianSettings(shards=2), 0)
    accumulate_hessians(StageContext(run, CPU), HessianSettings(shards=3), 1)
    with pytest.raises(ArtifactError, match="made by other settings"):
        sum_hessians(run, 0, 2)
    assert not run.hessian(0).exists()


def test_missing_shard(tmp_path):
    run = prepare(tmp_path / "run", architectures.build("llama"))
    accumulate_hessians(StageContext(run, CPU), HessianSettings(shards=2), 0)
    with pytest.raises(ArtifactError, match=r"shard_1.*missing"):
        sum_hessians(run, 0, 2)


def test_more_shards_than_sequences(tmp_path):
    run = prepare(tmp_path / "run", architectures.build("llama"), sequences=2)
    with pytest.raises(ConfigError, match=r"hessians\.shards: 3 shards of 2"):
        accumulate_hessians(StageContext(run, CPU), HessianSettings(shards=3), 0)


def test_infinite_activations_name_the_layer_and_leave_finished_blocks_whole(tmp_path):
    model = architectures.build("llama")
    model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    run = prepare(tmp_path / "run", model)
    with pytest.raises(CompressionError, match=r"model\.layers\.1\.mlp\.down_proj: NaN or infinity"):
        accumulate_hessians(StageContext(run, CPU), HessianSettings(), 0)
    read_tensors(run.hessian(0))
    assert not manifest_path(run.hessian(1)).exists()


def test_tokens_of_another_model(tmp_path):
    run = prepare(tmp_path / "run", architectures.build("llama"))
    write_text(run.model_manifest, '{"fingerprint": "other"}')
    with pytest.raises(ArtifactError, match="another model"):
        accumulate_hessians(StageContext(run, CPU), HessianSettings(), 0)
