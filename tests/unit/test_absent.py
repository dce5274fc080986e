"""Blocks run without a module: its contribution to the residual stream is zero, and its arithmetic is not done."""

from pathlib import Path

import pytest
import torch
from architectures import CONFIGS, OUTPUT_LAYERS, build, save, tokens
from torch import nn

from evopress.models.blockwise import BlockwiseModel
from evopress.models.modules import KINDS, modules_of
from evopress.models.structure import linear_layers
from evopress.util.errors import UnsupportedArchitectureError

CPU = torch.device("cpu")


def zeroed(block: nn.Module, kind: str) -> list[nn.Module]:
    """Linear layers whose output is the module's; with weight and bias zero the module returns zeros."""
    return [layer for name, layer in linear_layers(block).items() if name.rpartition(".")[2] in OUTPUT_LAYERS[kind]]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_module_that_is_left_out_adds_nothing(name: str, kind: str, tmp_path: Path) -> None:
    model = build(name)
    blockwise = BlockwiseModel.from_folder(save(model, tmp_path), CPU)
    ids = tokens()
    hidden, inputs = blockwise.embed(ids)
    blocks = [model.get_submodule(block) for block in blockwise.block_names]
    for layer in zeroed(blocks[1], kind):
        layer.weight.zero_()
        if layer.bias is not None:
            layer.bias.zero_()
    assert zeroed(blocks[1], kind)
    whole = hidden
    for index in range(len(blocks)):
        whole = blockwise.run_block(index, whole, inputs)
        hidden = blockwise.run_block(index, hidden, inputs, absent={kind} if index == 1 else ())
    torch.testing.assert_close(blockwise.logits(hidden), model(ids).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(whole, hidden, atol=1e-3)  # it had added something
    assert all("forward" not in module.__dict__ for module in blockwise.blocks[1].modules())


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma3", "opt"])
def test_what_is_left_out_needs_no_weights_and_runs_no_layer(name: str, tmp_path: Path) -> None:
    blockwise = BlockwiseModel.from_folder(save(build(name), tmp_path), CPU, resident=False)
    hidden, inputs = blockwise.embed(tokens())
    blockwise.load_block(0, linear_weights=False)
    layers = linear_layers(blockwise.blocks[0])
    modules = modules_of(layers)
    for absent, present in (KINDS, KINDS[::-1]):
        names = [f"{blockwise.block_names[0]}.{layer}.weight" for layer in modules[present].layers]
        stored = blockwise.checkpoint.read(names, dtype=torch.float32)
        weights = dict(zip(modules[present].layers, stored.values(), strict=True))
        blockwise.run_block(0, hidden, inputs, weights, absent={absent})  # has looked at a copy of the block
        calls: list[str] = []
        handles = [
            layer.register_forward_hook(lambda *_, name=name, calls=calls: calls.append(name))
            for name, layer in layers.items()
        ]
        output = blockwise.run_block(0, hidden, inputs, weights, absent={absent})  # the rest lies on the meta device
        for handle in handles:
            handle.remove()
        assert output.device == CPU and bool(output.isfinite().all())
        assert set(calls) - set(modules[absent].loose) == set(modules[present].layers)


def test_a_block_without_any_module_is_gone(tmp_path: Path) -> None:
    blockwise = BlockwiseModel.from_folder(save(build("opt-350m"), tmp_path), CPU, resident=False)  # norms come after
    hidden, inputs = blockwise.embed(tokens())
    assert blockwise.run_block(1, hidden, inputs, absent=KINDS) is hidden


def test_the_module_table_finds_containers_and_loose_layers() -> None:
    found = modules_of(["self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"])
    assert found["attn"].containers == ("self_attn",) and found["attn"].loose == ()
    assert found["mlp"].containers == () and found["mlp"].loose == ("fc1", "fc2")
    assert list(modules_of(["mlp.up_proj", "attention.dense"])) == ["attn", "mlp"]


class _BiasedNormAfter(nn.Module):
    """A residual branch whose norm comes last and has a bias."""

    def __init__(self, attention: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.self_attn, self.post_norm = attention, norm
        self.mlp = nn.Linear(32, 32)

    def forward(self, hidden_states, **kwargs):
        return hidden_states + self.post_norm(self.self_attn(hidden_states)) + self.mlp(hidden_states)


class _Attention(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.o_proj = nn.Linear(32, features)

    def forward(self, hidden_states):
        return self.o_proj(hidden_states)


def test_what_would_not_vanish_is_refused_by_name(tmp_path: Path) -> None:
    blockwise = BlockwiseModel.from_folder(save(build("llama"), tmp_path), CPU)
    hidden, inputs = blockwise.embed(tokens())
    blockwise.blocks[1] = _BiasedNormAfter(_Attention(32), nn.LayerNorm(32))
    with pytest.raises(UnsupportedArchitectureError, match=r"LlamaForCausalLM.*post_norm of block 1 adds a bias"):
        blockwise.run_block(1, hidden, inputs, absent={"attn"})
    blockwise.blocks[1] = _BiasedNormAfter(_Attention(64), nn.Linear(64, 32))
    with pytest.raises(UnsupportedArchitectureError, match="self_attn of block 1 cannot be dropped"):
        blockwise.run_block(1, hidden, inputs, absent={"attn"})
    blockwise.blocks[1] = _BiasedNormAfter(_Attention(32), nn.RMSNorm(32))
    kept = blockwise.run_block(1, hidden, inputs, absent={"attn"})
    torch.testing.assert_close(kept, hidden + blockwise.blocks[1].mlp(hidden))


@pytest.mark.parametrize("kind", KINDS)
def test_modules_that_add_the_residual_stream_themselves_cannot_be_left_out(kind: str, tmp_path: Path) -> None:
    """Their zeros would wipe it out."""
    blockwise = BlockwiseModel.from_folder(save(build("bloom"), tmp_path), CPU)
    hidden, inputs = blockwise.embed(tokens())
    with pytest.raises(UnsupportedArchitectureError, match=r"BloomForCausalLM.* of block 1 cannot be dropped"):
        blockwise.run_block(1, hidden, inputs, absent={kind})


@pytest.mark.parametrize("name", ["qwen3.5", "lfm2"])
def test_mixers_of_hybrid_models_are_left_out(name: str, tmp_path: Path) -> None:
    model = build(name)
    blockwise = BlockwiseModel.from_folder(save(model, tmp_path), CPU)
    hidden, inputs = blockwise.embed(tokens())
    without = blockwise.run_block(0, hidden, inputs, absent={"attn"})
    outputs = [layer for key, layer in linear_layers(blockwise.blocks[0]).items() if key.endswith("out_proj")]
    for layer in outputs:
        layer.weight.zero_()
    assert len(outputs) == 1 and torch.equal(without, blockwise.run_block(0, hidden, inputs))
