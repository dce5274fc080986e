"""A GGUF file gives the model that it stands for, or an error that names what cannot be had."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import pytest
import torch
import transformers
from gguf_files import LAYER, RMS

from evopress.models.config_file import count_blocks
from evopress.models.dequantize import dequantize
from evopress.models.gguf_config import read_config
from evopress.models.gguf_rope import from_factors
from evopress.models.sources import GgufModel
from evopress.util.errors import ModelError, UnsupportedArchitectureError

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BASE = {RMS: 1e-6, "rope.freq_base": 10000.0, "rope.dimension_count": 8}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 16,
}
LONG_TENSORS = {
    "rope_factors_short.weight": torch.tensor(LONG["short_factor"]),
    "rope_factors_long.weight": torch.tensor(LONG["long_factor"]),
}
YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 16,
    "rope.scaling.finetuned": True,
}
HEADS_OF_16 = {"attention.key_length": 16, "attention.value_length": 16, "rope.dimension_count": 16}


@dataclass(frozen=True)
class Case:
    """A model of transformers, and how converters write it."""

    architecture: str
    config: str
    values: dict[str, Any]
    keys: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    zero: str | None = None
    """Biases that are zero, and not in the file."""


def llama(keys: dict[str, Any] | None = None, zero: str | None = None, **values: Any) -> Case:
    return Case("llama", "LlamaConfig", {"rms_norm_eps": 1e-6, **values}, {**BASE, **(keys or {})}, zero=zero)


def gemma(version: int, keys: dict[str, Any], **values: Any) -> Case:
    config = {2: "Gemma2Config", 3: "Gemma3TextConfig"}[version]
    heads = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4}
    of_heads = {**HEADS_OF_16, "attention.sliding_window": 4, "rope.dimension_count": None}
    return Case(f"gemma{version}", config, {**heads, **values}, {**BASE, **of_heads, **keys})


def phi3(keys: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None, **values: Any) -> Case:
    return Case("phi3", "Phi3Config", {"rms_norm_eps": 1e-6, **values}, {**BASE, **keys}, tensors or {})


def stablelm(turned: int, keys: dict[str, Any] | None = None, **values: Any) -> Case:
    settings = {LAYER: 1e-5, "rope.freq_base": 10000.0, "rope.dimension_count": turned, **(keys or {})}
    return Case("stablelm", "StableLmConfig", {"partial_rotary_factor": turned / 8, **values}, settings)


CASES = {
    "llama": llama(),
    "llama-tied": llama(tie_word_embeddings=True),
    "llama-biases": llama(attention_bias=True, mlp_bias=True),
    "llama-some-biases": llama(attention_bias=True, zero="o_proj.bias"),
    "llama-larger-heads": llama(HEADS_OF_16, head_dim=16),
    "llama-base": llama({"rope.freq_base": 500000.0}, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "llama-no-base": llama({"rope.freq_base": None, "rope.dimension_count": None}),
    "llama-linear": llama({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, rope_parameters=LINEAR),
    "llama-linear-as-before": llama({"rope.scale_linear": 4.0}, rope_parameters=LINEAR),
    "llama-scaling-none": llama({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}),
    "llama-yarn": llama(YARN_KEYS, rope_parameters=YARN),
    "llama-neutral-keys": llama({"expert_count": 0, "logit_scale": 1.0, "attention.causal": True}),
    "mistral-by-name": llama(),
    "qwen2": Case("qwen2", "Qwen2Config", {}, BASE),
    "qwen2-yarn": Case("qwen2", "Qwen2Config", {"rope_parameters": YARN}, {**BASE, **YARN_KEYS}),
    "qwen2-no-biases": Case("qwen2", "Qwen2Config", {}, BASE, zero="_proj.bias"),
    "qwen3": Case("qwen3", "Qwen3Config", {"head_dim": 16}, {**BASE, **HEADS_OF_16}),
    "phi3": phi3({"attention.sliding_window": 0}),
    "phi3-sliding": phi3({"attention.sliding_window": 4}, sliding_window=4),
    "phi3-partial": phi3({"rope.dimension_count": 4}, partial_rotary_factor=0.5, tie_word_embeddings=True),
    "phi3-longrope": phi3(
        {"rope.scaling.original_context_length": 16, "rope.scaling.attn_factor": 1.2247449},
        LONG_TENSORS,
        rope_parameters=LONG,
        original_max_position_embeddings=16,
    ),
    "gemma2": gemma(
        2,
        {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": gemma(
        3,
        {"rope.freq_base": 1e6, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        num_hidden_layers=7,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "gemma3-pattern": gemma(
        3,
        {"attention.sliding_window_pattern": [True, False, True], "rope.freq_base": 1e6, "rope.freq_base_swa": 1e3},
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    ),
    "starcoder2": Case(
        "starcoder2",
        "Starcoder2Config",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 999999.0}},
        {LAYER: 1e-5, "rope.freq_base": 999999.0},
    ),
    "stablelm": stablelm(2),
    "stablelm-parallel": stablelm(4, {"use_parallel_residual": True}, use_parallel_residual=True, use_qkv_bias=True),
    "nemotron": Case(
        "nemotron",
        "NemotronConfig",
        {"partial_rotary_factor": 0.5},
        {**BASE, RMS: None, LAYER: 1e-5} | {"rope.dimension_count": 4},
    ),
    "lfm2": Case(
        "lfm2",
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
        {RMS: 1e-5, "rope.freq_base": 1000000.0, "shortconv.l_cache": 3, "attention.head_count_kv": [0, 2, 0]},
    ),
}


def build(case: Case) -> transformers.PreTrainedModel:
    """A model whose norms and biases differ from what they start as."""
    torch.manual_seed(0)
    config = getattr(transformers, case.config)(**{**SIZES, **case.values}, initializer_range=0.2)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.2)
        if case.zero and name.endswith(case.zero):
            parameter.zero_()
    return model


def write(path: Path, case: Case, **options: Any) -> transformers.PreTrainedModel:
    """Write the case's file; returns the model that it stands for."""
    model = build(case)
    lost = []
    if case.zero:
        stored = gguf_files.stored(model, case.architecture)
        lost = [name for name, tensor in stored.items() if name.endswith(".bias") and not tensor.any()]
        assert lost
    tensors = {**case.tensors, **options.pop("tensors", {})}
    without = [*lost, *options.pop("without", ())]
    keys = {**case.keys, **options.pop("keys", {})}
    gguf_files.write(path, model, case.architecture, keys, tensors=tensors, without=without, **options)
    return model


def same_logits(folder: Path, model: transformers.PreTrainedModel) -> None:
    """The folder's model gives the logits of ``model`` over as many tokens as it has positions."""
    made = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(3, 96, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(made(tokens).logits, model(tokens).logits, atol=1e-3, rtol=1e-3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "made").mkdir()
    return tmp_path / "made"


@pytest.mark.parametrize("name", CASES)
def test_same_logits(name: str, tmp_path: Path, folder: Path) -> None:
    metadata = {"general.name": "mistral"} if name == "mistral-by-name" else {}
    model = write(tmp_path / "tiny.gguf", CASES[name], metadata=metadata)
    dequantize(tmp_path / "tiny.gguf", folder, torch.float32)
    same_logits(folder, model)


def factors_of(rope: dict[str, Any]) -> torch.Tensor:
    """By which the angle of each frequency is divided."""
    plain, scaled = (
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, rope_parameters=parameters))
        for parameters in (None, rope)
    )
    return plain.model.rotary_emb.inv_freq / scaled.model.rotary_emb.inv_freq


def test_factors_of_llama_3_are_honoured(tmp_path: Path, folder: Path) -> None:
    case = llama(rope_parameters=LLAMA3)
    factors = factors_of(LLAMA3)
    assert factors[0] == 1 < factors[1] < factors[-1] == 8
    model = write(tmp_path / "tiny.gguf", case, tensors={"rope_freqs.weight": factors})
    dequantize(tmp_path / "tiny.gguf", folder, torch.float32)
    assert transformers.AutoConfig.from_pretrained(folder).rope_parameters == LLAMA3
    same_logits(folder, model)


def test_factors_of_no_known_kind_are_honoured(tmp_path: Path, folder: Path) -> None:
    factors = [1.0, 3.0, 2.0, 5.0]
    rope = {**LONG, "short_factor": factors, "long_factor": factors, "attention_factor": 1.0}
    model = write(
        tmp_path / "tiny.gguf", llama(rope_parameters=rope), tensors={"rope_freqs.weight": torch.tensor(factors)}
    )
    dequantize(tmp_path / "tiny.gguf", folder, torch.float32)
    same_logits(folder, model)


def test_factors_of_another_number_of_frequencies_are_refused(tmp_path: Path, folder: Path) -> None:
    write(tmp_path / "tiny.gguf", llama(), tensors={"rope_freqs.weight": torch.ones(8)})
    with pytest.raises(UnsupportedArchitectureError, match=r"dimension_count: is 8, and rope_freqs\.weight has 8"):
        dequantize(tmp_path / "tiny.gguf", folder, torch.float32)


def test_factors_of_published_models_are_recognized() -> None:
    """Llama 3.1 has 64 frequencies over a base of 500,000."""
    published = {**LLAMA3, "rope_theta": 5e5, "factor": 32.0, "original_max_position_embeddings": 8192}
    sizes = {**SIZES, "head_dim": 128, "max_position_embeddings": 131072}
    plain, scaled = (
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, rope_parameters=parameters)).model.rotary_emb
        for parameters in ({"rope_type": "default", "rope_theta": 5e5}, published)
    )
    found = from_factors((plain.inv_freq / scaled.inv_freq).tolist(), 5e5, 131072)
    assert {**found, "rope_theta": 5e5} == published
    assert from_factors([1.0] * 64, 5e5, 131072) == {"rope_type": "default"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"expert_count": 8}, r"llama\.expert_count: is 8"),
        ({"logit_scale": 0.5}, r"llama\.logit_scale: is 0\.5"),
        ({"attention.scale": 0.25}, r"llama\.attention\.scale: is 0\.25"),
        ({"attention.sliding_window": 16}, r"llama\.attention\.sliding_window: is 16"),
        ({"attention.value_length": 4}, r"llama\.attention\.value_length: differs"),
        ({"attention.causal": False}, r"llama\.attention\.causal: is False"),
        ({"final_logit_softcapping": 30.0}, r"llama\.final_logit_softcapping"),
        ({"rope.dimension_count": 4}, r"llama\.rope\.dimension_count: is 4, where a head has 8"),
        ({"rope.scaling.type": "longrope"}, r"llama\.rope\.scaling\.type: 'longrope'"),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 2.0, "rope.scaling.attn_factor": 2.0}, "attn_factor"),
        ({"attention.head_count_kv": [2, 2, 1]}, r"llama\.attention\.head_count_kv: differs from block to block"),
        ({"key_of_the_future": 1}, r"llama\.key_of_the_future: is 1"),
    ],
)
def test_keys_that_cannot_be_honoured_are_refused_by_name(
    keys: dict[str, Any], message: str, tmp_path: Path, folder: Path
) -> None:
    write(tmp_path / "tiny.gguf", llama(), keys=keys)
    with pytest.raises(UnsupportedArchitectureError, match=message):
        dequantize(tmp_path / "tiny.gguf", folder, torch.float32)
    assert not list(folder.iterdir())


def test_files_that_are_no_model_are_refused(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write(path, llama(), metadata={"general.type": "adapter"})
    with pytest.raises(ModelError, match=r"general\.type is 'adapter'"):
        dequantize(path, folder, torch.float32)
    write(path, llama(), keys={RMS: None})
    with pytest.raises(ModelError, match=r"its header lacks llama\.attention\.layer_norm_rms_epsilon"):
        dequantize(path, folder, torch.float32)
    writer = gguf.GGUFWriter(path, "falcon")
    writer.add_tensor("token_embd.weight", build(llama()).model.embed_tokens.weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedArchitectureError, match="falcon: this architecture is not supported from GGUF"):
        dequantize(path, folder, torch.float32)


@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_tensors_are_neither_lost_nor_left_over(name: str, tmp_path: Path, folder: Path) -> None:
    lost = "blk.1.ffn_down.weight" if name == "llama" else "blk.1.attn_q.weight"
    write(tmp_path / "lost.gguf", CASES[name], without=[lost])
    with pytest.raises(ModelError, match=rf"lacks ({lost}|model\.layers\.1\.self_attn\.q_proj\.weight)"):
        dequantize(tmp_path / "lost.gguf", folder, torch.float32)
    write(tmp_path / "more.gguf", CASES[name], tensors={"blk.0.attn_sinks.weight": torch.ones(4)})
    with pytest.raises(UnsupportedArchitectureError, match=r"holds (blk|model\.layers)\.0\.attn_sinks\.weight"):
        dequantize(tmp_path / "more.gguf", folder, torch.float32)


def test_a_bias_that_one_block_lacks_is_missed(tmp_path: Path, folder: Path) -> None:
    write(tmp_path / "tiny.gguf", CASES["llama-biases"], without=["blk.1.attn_output.bias"])
    with pytest.raises(ModelError, match=r"lacks blk\.1\.attn_output\.bias"):
        dequantize(tmp_path / "tiny.gguf", folder, torch.float32)


def test_tensor_of_another_shape_is_named(tmp_path: Path, folder: Path) -> None:
    write(tmp_path / "tiny.gguf", llama(), tensors={"blk.1.ffn_up.weight": torch.ones(40, 32)})
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_up\.weight is \[40, 32\], and its header asks for \[48, 32\]"):
        dequantize(tmp_path / "tiny.gguf", folder, torch.float32)


def test_output_layer_that_repeats_the_embedding(tmp_path: Path, folder: Path) -> None:
    """Some files hold a copy of a tied embedding, which may be stored more precisely."""
    model = build(CASES["gemma2"])
    head = {"output.weight": model.model.embed_tokens.weight * 2}
    write(tmp_path / "tiny.gguf", CASES["gemma2"], tensors=head)
    dequantize(tmp_path / "tiny.gguf", folder, torch.float32)
    made = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(made.lm_head.weight, model.model.embed_tokens.weight * 2)
    assert torch.equal(made.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_more_embeddings_than_tokens(tmp_path: Path, folder: Path) -> None:
    case = llama(vocab_size=128)
    model = write(tmp_path / "tiny.gguf", case, keys={"vocab_size": 96})
    dequantize(tmp_path / "tiny.gguf", folder, torch.float32)
    same_logits(folder, model)
    write(tmp_path / "few.gguf", llama(vocab_size=64))
    with pytest.raises(ModelError, match=r"tokenizer\.ggml\.tokens has 96, and the model embeddings for 64"):
        dequantize(tmp_path / "few.gguf", folder, torch.float32)


def split(path: Path, count: int, tensors: int | None = None) -> list[Path]:
    """Cut a file as llama.cpp does: the first part holds the whole header, and here no tensors."""
    reader = gguf.GGUFReader(path)
    parts = [path.with_name(f"tiny-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    for number, part in enumerate(parts):
        writer = (
            gguf.GGUFWriter(part, reader.fields["general.architecture"].contents())
            if number == 0
            else gguf.GGUFWriter(part, "")
        )
        for key in list(reader.fields.values()) if number == 0 else []:
            if not key.name.startswith("GGUF.") and key.name != "general.architecture":
                kind = key.types[0]
                items = key.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(key.name, key.contents(), kind, sub_type=items)
        if number:
            writer.kv_data[0].pop("general.architecture", None)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors) if tensors is None else tensors)
        for tensor in reader.tensors[number - 1 :: count - 1] if number else []:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return parts


@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_split_files_are_joined(name: str, tmp_path: Path, folder: Path) -> None:
    model = write(tmp_path / "whole.gguf", CASES[name])
    parts = split(tmp_path / "whole.gguf", 3)
    assert read_config(parts[0]).num_hidden_layers == 3
    assert count_blocks(GgufModel(path=str(parts[0]))) == 3
    assert dequantize(parts[0], folder, torch.float32) == parts
    same_logits(folder, model)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["made", "whole.gguf", *(part.name for part in parts)]
    )


def test_split_files_that_are_not_whole(tmp_path: Path, folder: Path) -> None:
    write(tmp_path / "whole.gguf", llama())
    parts = split(tmp_path / "whole.gguf", 3, tensors=99)
    with pytest.raises(ModelError, match=r"tiny-00001-of-00003\.gguf: promises 99 tensors"):
        dequantize(parts[0], folder, torch.float32)
    with pytest.raises(ModelError, match=r"is part 00002 of 3; give the first part, tiny-00001-of-00003\.gguf"):
        dequantize(parts[1], folder, torch.float32)
    parts[2].rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(ModelError, match=r"tiny-00003-of-00003\.gguf: missing"):
        dequantize(parts[0], folder, torch.float32)
    parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(ModelError, match=r"renamed\.gguf: is one of 3 parts \(split\.count\); name them"):
        dequantize(tmp_path / "renamed.gguf", folder, torch.float32)
