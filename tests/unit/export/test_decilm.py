"""The layout of DeciLM: read as vLLM's model code reads it, it gives what the search judged."""

import json

import pytest
import torch
import transformers
from architectures import build, tokens
from depth_run import without, write_depth_configuration, write_depth_model
from torch import nn
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from evopress.artifacts.paths import Run
from evopress.config.context import StageContext
from evopress.export.card import write_card
from evopress.export.exporters.decilm import DeciLm, ffn_mult
from evopress.export.stage import run_export
from evopress.models.checkpoint import Checkpoint
from evopress.util.errors import ArtifactError, UnsupportedArchitectureError

BLOCKS = 4
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 256,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama3-rope": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("MistralConfig", {"sliding_window": None, "head_dim": 16}),
}
CASES = {
    "single": {(1, "attn"), (3, "mlp")},
    "with-a-block-gone": {(0, "attn"), (0, "mlp"), (2, "attn"), (3, "mlp"), (1, "mlp")},
    "first-attention": {(0, "attn"), (2, "mlp")},
    "first-attention-after-a-block": {(0, "attn"), (0, "mlp"), (1, "attn"), (2, "mlp")},
}


class DeciReader:
    """vLLM's `nemotron_nas.py` with the modules of transformers: what it builds, loads and computes, block by block."""

    def __init__(self, folder) -> None:
        self.config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        self.config._attn_implementation = "eager"
        checkpoint = Checkpoint(folder)
        self.tensors = checkpoint.read(checkpoint.names())
        config, blocks = self.config, self.config.block_configs
        assert len(blocks) == config.num_hidden_layers and config.architectures == ["DeciLMForCausalLM"]
        self.embedding = self.tensors.pop("model.embed_tokens.weight")
        self.blocks = [self._block(f"model.layers.{number}.", block) for number, block in enumerate(blocks)]
        self.norm = self._load(LlamaRMSNorm(config.hidden_size, config.rms_norm_eps), "model.norm.")
        self.head = self.embedding if config.tie_word_embeddings else self.tensors.pop("lm_head.weight")
        assert not self.tensors  # nothing is stored that this code would not know

    def _block(self, prefix, block) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {}
        if not block.attention.no_op:
            values = {**self.config.to_dict(), "num_key_value_heads": self.config.num_attention_heads}
            values["num_key_value_heads"] //= block.attention.n_heads_in_group
            config = transformers.LlamaConfig(**values)
            config._attn_implementation = "eager"
            modules["self_attn"] = LlamaAttention(config, 0)
            modules["input_layernorm"] = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        if not block.ffn.no_op:
            size = int(2 * block.ffn.ffn_mult * self.config.hidden_size / 3)
            size += -size % 256
            modules["mlp"] = LlamaMLP(transformers.LlamaConfig(**{**self.config.to_dict(), "intermediate_size": size}))
            modules["post_attention_layernorm"] = LlamaRMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        return {name: self._load(module, f"{prefix}{name}.") for name, module in modules.items()}

    def _load(self, module, prefix) -> nn.Module:
        names = [name for name in self.tensors if name.startswith(prefix)]
        module.load_state_dict({name.removeprefix(prefix): self.tensors.pop(name) for name in names})  # strict
        return module

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        hidden, residual = self.embedding[ids], None
        length = ids.shape[1]
        positions = torch.arange(length)[None]
        rotary = LlamaRotaryEmbedding(self.config)(hidden, positions)
        mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
        for block in self.blocks:
            if "self_attn" in block:
                residual = hidden if residual is None else residual + hidden
                hidden = block["self_attn"](block["input_layernorm"](residual), rotary, mask)[0]
            if "mlp" in block:
                assert residual is not None  # vLLM's norm cannot be given a residual that is not there
                residual = residual + hidden
                hidden = block["mlp"](block["post_attention_layernorm"](residual))
        return self.norm(hidden + residual) @ self.head.T


def _model(name):
    kind, values = MODELS[name]
    torch.manual_seed(3)
    config = getattr(transformers, kind)(**{**SIZES, **values})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def _written(tmp_path, model, dropped):
    run = Run(tmp_path / "run")
    write_depth_model(run, model)
    write_depth_configuration(run, "evo", dropped)
    run_export(StageContext(run), "evo", DeciLm())
    return run


@pytest.mark.parametrize("dropped", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", MODELS)
def test_gives_the_logits_of_the_whole_model_with_those_modules_silenced(tmp_path, name, dropped):
    model = _model(name)
    run = _written(tmp_path, model, dropped)
    ids = tokens()
    with torch.no_grad(), without(model, dropped):
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(DeciReader(run.export("evo", "decilm")).logits(ids), expected, atol=2e-4, rtol=1e-4)


def test_tensors_of_dropped_modules_are_not_stored(tmp_path):
    run = _written(tmp_path, _model("llama"), CASES["with-a-block-gone"])
    names = Checkpoint(run.export("evo", "decilm")).names()
    assert len({name.split(".")[2] for name in names if ".layers." in name}) == 3
    held = {
        number: {name.split(".")[3] for name in names if name.startswith(f"model.layers.{number}.")}
        for number in range(3)
    }
    attention, mlp = {"input_layernorm", "self_attn"}, {"post_attention_layernorm", "mlp"}
    assert held == {0: attention, 1: mlp, 2: attention}
    blocks = json.loads((run.export("evo", "decilm") / "config.json").read_text())["block_configs"]
    assert [block["attention"]["no_op"] for block in blocks] == [False, True, False]
    assert blocks[1]["attention"]["n_heads_in_group"] is None and blocks[0]["attention"]["n_heads_in_group"] == 2
    assert [block["ffn"]["ffn_mult"] for block in blocks] == [None, 8.0, None]


def test_the_config_is_whole_and_survives_saving(tmp_path):
    model = _model("llama3-rope")
    run = _written(tmp_path, model, CASES["single"])
    config = AutoConfig.from_pretrained(run.export("evo", "decilm"), trust_remote_code=True)
    assert config.rope_parameters == model.config.rope_parameters and config.num_key_value_heads == 2
    raw = json.loads((run.export("evo", "decilm") / "config.json").read_text())
    assert raw["rope_theta"] == 500.0 and raw["rope_scaling"]["rope_type"] == "llama3"
    config.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["block_configs"] == raw["block_configs"]
    assert not hasattr(config.block_configs[0].ffn, "hidden_act")  # vLLM would take it in place of the model's own


def test_the_card_tells_of_the_layout(tmp_path):
    run = _written(tmp_path, _model("llama"), CASES["first-attention"])
    write_card(StageContext(run), "evo", DeciLm())
    text = run.card("evo", "decilm").read_text()
    assert "vLLM" in text and "`no_op`" in text and "AutoModelForCausalLM" not in text
    assert "| 0 | 0 | dropped (zeros) | kept |" in text and "| 2 | 2 | kept | dropped |" in text
    stored = sum(Checkpoint(run.export("evo", "decilm")).elements().values())
    assert f"| parameters stored in this folder | {stored:,} |" in text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen2", "it is a qwen2"),
        ("llama-bias", "its blocks have mlp.down_proj.bias"),
        ("gemma3", "it is a gemma3_text"),
        ("mistral", "it attends in sliding windows"),
        ("llama", "intermediate_size 48.*multiples of 256.*would make it 256"),
    ],
)
def test_what_the_layout_cannot_say_is_refused(tmp_path, name, message):
    with pytest.raises(UnsupportedArchitectureError, match=message):
        _written(tmp_path, build(name), {(1, "attn")})
    assert list((tmp_path / "run" / "exports" / "evo").iterdir()) == []


def test_a_configuration_that_drops_nothing_of_this_kind_is_refused(tmp_path):
    from finished_run import make_results, write_configuration

    run = make_results(tmp_path)
    write_configuration(run, "evo")
    with pytest.raises(ArtifactError, match="drops no modules"):
        run_export(StageContext(run), "evo", DeciLm())


@pytest.mark.parametrize(
    ("intermediate", "hidden"), [(1536, 576), (11008, 4096), (14336, 4096), (28672, 8192), (8192, 2048), (8192, 3072)]
)
def test_sizes_of_known_models_come_out_of_the_factor(intermediate, hidden):
    size = int(2 * ffn_mult(intermediate, hidden) * hidden / 3)
    assert size + -size % 256 == intermediate
