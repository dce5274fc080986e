"""Layer tables of every tested architecture, and architectures that are refused by name."""

from collections import UserDict
from functools import partial

import pandas as pd
import pytest
import torch
import transformers
from architectures import CONFIGS, build

from evopress.artifacts.tables import LAYERS
from evopress.models.skeleton import load_config, skeleton_of
from evopress.models.structure import find_blocks, layer_table
from evopress.util.errors import UnsupportedArchitectureError

GATED = [
    # layer, input group, module, rows, columns
    ("self_attn.q_proj", "self_attn.q_proj", "attn", 32, 32),
    ("self_attn.k_proj", "self_attn.q_proj", "attn", 16, 32),
    ("self_attn.v_proj", "self_attn.q_proj", "attn", 16, 32),
    ("self_attn.o_proj", "self_attn.o_proj", "attn", 32, 32),
    ("mlp.gate_proj", "mlp.gate_proj", "mlp", 48, 32),
    ("mlp.up_proj", "mlp.gate_proj", "mlp", 48, 32),
    ("mlp.down_proj", "mlp.down_proj", "mlp", 32, 48),
]
FUSED = [
    ("self_attn.qkv_proj", "self_attn.qkv_proj", "attn", 64, 32),
    ("self_attn.o_proj", "self_attn.o_proj", "attn", 32, 32),
    ("mlp.gate_up_proj", "mlp.gate_up_proj", "mlp", 96, 32),
    ("mlp.down_proj", "mlp.down_proj", "mlp", 32, 48),
]
OPT = [
    ("self_attn.q_proj", "self_attn.q_proj", "attn", 32, 32),
    ("self_attn.k_proj", "self_attn.q_proj", "attn", 32, 32),
    ("self_attn.v_proj", "self_attn.q_proj", "attn", 32, 32),
    ("self_attn.out_proj", "self_attn.out_proj", "attn", 32, 32),
    ("fc1", "fc1", "mlp", 48, 32),
    ("fc2", "fc2", "mlp", 32, 48),
]
PHI = [
    ("self_attn.q_proj", "self_attn.q_proj", "attn", 32, 32),
    ("self_attn.k_proj", "self_attn.q_proj", "attn", 32, 32),
    ("self_attn.v_proj", "self_attn.q_proj", "attn", 32, 32),
    ("self_attn.dense", "self_attn.dense", "attn", 32, 32),
    ("mlp.fc1", "self_attn.q_proj", "mlp", 48, 32),
    ("mlp.fc2", "mlp.fc2", "mlp", 32, 48),
]
NEOX = [
    ("attention.query_key_value", "attention.query_key_value", "attn", 96, 32),
    ("attention.dense", "attention.dense", "attn", 32, 32),
    ("mlp.dense_h_to_4h", "mlp.dense_h_to_4h", "mlp", 48, 32),
    ("mlp.dense_4h_to_h", "mlp.dense_4h_to_h", "mlp", 32, 48),
]
PREFIXES = {"opt": "model.decoder.layers", "opt-350m": "model.decoder.layers"}
PREFIXES |= {"gpt-neox": "gpt_neox.layers", "gpt-neox-sequential": "gpt_neox.layers"}


def expected_block(name: str) -> list[tuple]:
    if name.startswith("phi3"):
        return FUSED
    if name.startswith("gpt-neox"):
        return NEOX
    if name == "phi":
        return PHI
    return OPT if name.startswith("opt") else GATED


@pytest.mark.parametrize("name", CONFIGS)
def test_layer_table(name: str) -> None:
    table = layer_table(build(name))
    assert list(table.columns) == LAYERS.names
    prefix = PREFIXES.get(name, "model.layers")
    assert sorted(table["block"].unique()) == [0, 1, 2]
    for block, rows in table.groupby("block"):
        columns = ["layer", "input_group", "module", "rows", "columns"]
        assert set(rows[columns].itertuples(index=False, name=None)) == set(expected_block(name))
        assert (rows["name"] == f"{prefix}.{block}." + rows["layer"]).all()
    assert (table["parameters"] == table["rows"] * table["columns"]).all()
    assert (table["kind"] == table["layer"].str.split(".").str[-1]).all()


def test_rows_follow_execution_and_groups_start_with_their_first_layer() -> None:
    table = layer_table(build("llama")).query("block == 0")
    assert list(table["layer"]) == [row[0] for row in GATED]


def test_names_lead_to_the_weights() -> None:
    model = build("phi3")
    for row in layer_table(model).itertuples():
        assert model.get_submodule(row.name).weight.shape == (row.rows, row.columns)


def test_parallel_attention_and_mlp_share_an_input() -> None:
    """Where one norm feeds attention and MLP alike, one Hessian serves both."""
    config = transformers.PhiConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    table = layer_table(transformers.AutoModelForCausalLM.from_config(config).eval())
    groups = table.query("block == 1").set_index("layer")["input_group"]
    assert groups["mlp.fc1"] == groups["self_attn.v_proj"] == "self_attn.q_proj"


def test_table_needs_no_weights_of_blocks() -> None:
    model = build("gemma3")
    expected = layer_table(model)
    for block in find_blocks(model)[1]:
        block.to("meta")
    pd.testing.assert_frame_equal(layer_table(model), expected)


def test_blocks_are_found_beside_a_larger_vision_tower() -> None:
    """The list is chosen by the text config's number of layers, not by size alone."""
    sizes = dict(CONFIGS["gemma3"][1])
    vision = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(text_config=sizes, vision_config=vision, mm_tokens_per_image=4)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert find_blocks(model)[0] == "model.language_model.layers"


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
HEADS = {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
REFUSED = {
    "GPT2LMHeadModel.*Conv1D": transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64),
    r"MixtralForCausalLM.* 75% of its blocks' weights lie in no linear layer, as does model\.layers\.0\.mlp\.experts"
    ".*take a dense model": transformers.MixtralConfig(**HEADS, num_local_experts=2),
    "MambaForCausalLM.*mixer.dt_proj of block 0 does not run on every token": transformers.MambaConfig(
        **SMALL, state_size=4
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_unsupported_architectures_are_named(message: str) -> None:
    model = transformers.AutoModelForCausalLM.from_config(REFUSED[message]).eval()
    with pytest.raises(UnsupportedArchitectureError, match=message):
        layer_table(model)


@pytest.mark.parametrize("kind", ["T5Config", "BartConfig"])
def test_encoder_decoders_are_named(kind: str, tmp_path) -> None:
    getattr(transformers, kind)().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitectureError, match=r"(t5|bart): an encoder and a decoder"):
        skeleton_of(load_config(tmp_path), torch.float32)


def test_modules_that_mix_tokens_in_place_of_attention_are_of_its_kind() -> None:
    for name, mixer in {"qwen3.5": "linear_attn", "lfm2": "conv"}.items():
        table = layer_table(build(name)).query("block == 0")
        assert set(table[table["module"] == "attn"]["layer"].str.partition(".")[0]) == {mixer}
        assert len(set(table["module"])) == 2


def patched_llama(monkeypatch: pytest.MonkeyPatch, blocks) -> transformers.PreTrainedModel:
    """A Llama whose list of blocks is iterated as ``blocks`` says."""
    model = build("llama")
    monkeypatch.setattr(type(model.model.layers), "__getitem__", lambda self, key: blocks(list(self.children())))
    return model


def test_blocks_that_run_twice_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched_llama(monkeypatch, lambda layers: [*layers, layers[-1]])
    with pytest.raises(UnsupportedArchitectureError, match=r"do not run once each in order, but as \[0, 1, 2, 2\]"):
        layer_table(model)


def test_blocks_with_something_between_them_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched_llama(monkeypatch, lambda layers: [layers[0], lambda hidden, **_: hidden * 2, *layers[1:]])
    with pytest.raises(UnsupportedArchitectureError, match="block 1 does not run on what block 0 returns"):
        layer_table(model)


def test_blocks_that_share_a_state_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 4's small sizes hand keys and values from block to block in it."""
    plain = transformers.models.llama.modeling_llama.LlamaDecoderLayer.forward
    state: UserDict[str, torch.Tensor] = UserDict()

    def forward(self, hidden_states, state=None, **kwargs):
        state["keys"] = hidden_states
        return plain(self, hidden_states, **kwargs)

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaDecoderLayer, "forward", forward)
    model = patched_llama(monkeypatch, lambda layers: [partial(layer, state=state) for layer in layers])
    with pytest.raises(UnsupportedArchitectureError, match=r"LlamaForCausalLM.*more than hidden states \(UserDict\)"):
        layer_table(model)


def test_blocks_that_get_what_others_return_beside_hidden_states_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """T5's first block makes the position bias of all others."""
    blocks = transformers.models.gptj.modeling_gptj
    seen: list[object] = [None]

    def forward(self, hidden_states, layer_past=None, attention_mask=None, position_ids=None, **_):
        return plain(self, hidden_states, attention_mask=attention_mask, position_ids=position_ids)

    def call(self, hidden_states, **kwargs):
        output = torch.nn.Module.__call__(self, hidden_states, **{**kwargs, "bias": seen[0]})
        seen[0] = output[1]
        return output

    plain = blocks.GPTJBlock.forward
    monkeypatch.setattr(blocks.GPTJBlock, "forward", forward)
    monkeypatch.setattr(blocks.GPTJBlock, "__call__", call)
    with pytest.raises(UnsupportedArchitectureError, match=r"GPTJForCausalLM.*more than hidden states \(Unused\)"):
        layer_table(build("gptj"))


def test_blocks_that_share_weights_are_refused() -> None:
    model = build("llama")
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(UnsupportedArchitectureError, match="share weights"):
        layer_table(model)


def test_idle_linear_layers_are_refused() -> None:
    model = build("llama")
    model.model.layers[1].mlp.spare = torch.nn.Linear(32, 32)
    with pytest.raises(UnsupportedArchitectureError, match=r"mlp\.spare of block 1 does not run on every token"):
        layer_table(model)
