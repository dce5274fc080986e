"""What is written as GGUF reads back as the same model: same logits, same tokens; or it is refused by name."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from gguf import GGMLQuantizationType
from gguf_layouts import TINY, byte_level, folder_of, packed_weights, sentencepiece, tiny, tokens
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors

from evopress.export.gguf.file import Packed, write_gguf
from evopress.export.gguf.layouts import LAYOUTS
from evopress.export.gguf.vocabulary import check_tokens, tokenizer_keys
from evopress.models.gguf_config import read_config
from evopress.models.gguf_header import read_gguf_header
from evopress.models.gguf_tokenizer import PRETOKENIZERS
from evopress.models.gguf_weights import read_tensor, read_weights
from evopress.util.errors import ModelError, UnsupportedArchitectureError

F32, Q8_0 = GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0
ROWS = 512


def reread(path: Path) -> transformers.PreTrainedModel:
    """The model that a GGUF file stands for."""
    header, config = read_gguf_header(path), read_config(path)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(read_weights(path, header, model, torch.float32), strict=False)
    model.tie_weights()
    return model


def logits(model: transformers.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens()])).logits


def written(model: transformers.PreTrainedModel, tmp_path: Path, **options: Any) -> Path:
    path = tmp_path / "x.gguf"
    write_gguf(folder_of(model, tmp_path / "model"), path, options.pop("packed", {}), name="tiny", **options)
    return path


@pytest.mark.parametrize("name", TINY)
def test_the_file_reads_back_as_the_same_model(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    path = written(model, tmp_path, dense=F32)
    torch.testing.assert_close(logits(reread(path)), logits(model), atol=1e-4, rtol=1e-4)


def test_every_layout_is_tried() -> None:
    assert {tiny(name).config.model_type for name in TINY} == set(LAYOUTS)


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma3"])
@pytest.mark.parametrize("kind", [Q8_0, GGMLQuantizationType.Q4_K])
def test_packed_weights_are_written_as_they_are(name: str, kind: GGMLQuantizationType, tmp_path: Path) -> None:
    model = tiny(name)
    packed = packed_weights(model, kind)  # gives the model the weights that the blocks stand for
    path = written(model, tmp_path, packed=packed, dense=F32)
    torch.testing.assert_close(logits(reread(path)), logits(model), atol=1e-4, rtol=1e-4)
    kinds = {key.split(".")[-2]: tensor.kind for key, tensor in read_gguf_header(path).tensors.items()}
    assert kinds["ffn_down"] == kinds["ffn_up"] == kind
    assert kinds["attn_norm"] == kinds["token_embd"] == F32


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_matrices_that_are_not_packed_take_the_type_asked_for(kind: str, tmp_path: Path) -> None:
    model = tiny("llama", intermediate_size=240)  # rows that are no whole blocks of Q8_0
    header = read_gguf_header(written(model, tmp_path, dense=GGMLQuantizationType[kind]))
    embedding = header.tensors["token_embd.weight"]
    assert gguf.GGMLQuantizationType(embedding.kind).name == kind
    original = model.get_input_embeddings().weight
    torch.testing.assert_close(read_tensor(embedding), original, atol=2e-3, rtol=4e-3)
    assert header.tensors["blk.0.attn_norm.weight"].kind == F32
    narrow = GGMLQuantizationType(header.tensors["blk.0.ffn_down.weight"].kind).name
    assert narrow == ("F16" if kind == "Q8_0" else kind)


def test_weights_beyond_f16_are_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight[3, 5] = 1e5
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: holds 100000, which F16 cannot"):
        written(model, tmp_path)


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        ({"model.layers.9.mlp.up_proj.weight": (256, 272)}, "model.layers.9.mlp.up_proj.weight: is packed, and the"),
        (
            {"model.layers.0.mlp.up_proj.weight": (256, 34)},
            r"is packed as \[256, 34\] bytes, and Q8_0 needs \[256, 272",
        ),
    ],
)
def test_packed_weights_of_another_model_are_refused(
    packed: dict[str, tuple[int, int]], message: str, tmp_path: Path
) -> None:
    blocks = {name: Packed(np.zeros(shape, np.uint8), Q8_0) for name, shape in packed.items()}
    with pytest.raises(ValueError, match=message):
        written(tiny("llama"), tmp_path, packed=blocks)


def test_the_header_names_the_model_and_its_terms(tmp_path: Path) -> None:
    folder = folder_of(tiny("llama"), tmp_path / "model")
    card = {"license": "apache-2.0", "language": "en"}
    write_gguf(folder, tmp_path / "x.gguf", {}, name="Tiny 1M", card=card, dense=Q8_0)
    told = read_gguf_header(tmp_path / "x.gguf", whole="general.").metadata
    assert told["general.name"] == "Tiny 1M" and told["general.license"] == "apache-2.0"
    assert told["general.languages"] == ["en"] and told["general.quantization_version"] == gguf.GGML_QUANT_VERSION


@pytest.mark.parametrize(("name", "window"), [("mistral-window", 32), ("phi3-window", 32), ("mistral", 64)])
def test_a_window_that_the_runtime_lacks_bounds_the_context(name: str, window: int, tmp_path: Path) -> None:
    header = read_gguf_header(written(tiny(name), tmp_path)).metadata
    assert header[f"{header['general.architecture']}.context_length"] == window


def test_modules_missing_elsewhere_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedArchitectureError, match="without attention or MLP in Llamas only; drop whole blocks"
    ):
        written(tiny("qwen2"), tmp_path, absent={(1, "attn")})


def test_one_module_missing_makes_a_llama_deci(tmp_path: Path) -> None:
    path = written(tiny("llama"), tmp_path, absent={(0, "attn"), (1, "attn"), (2, "mlp")})
    header = read_gguf_header(path)
    assert header.architecture == "deci"
    assert header.metadata["deci.attention.head_count"] == [4, 0, 4]  # of the first block, the size of heads is told
    assert header.metadata["deci.attention.head_count_kv"] == [2, 0, 2]
    assert header.metadata["deci.feed_forward_length"] == [256, 256, 32]
    assert {name for name in header.tensors if name.startswith("blk.1.attn")} == set()
    down = read_tensor(header.tensors["blk.2.ffn_down.weight"])
    assert down.shape == (256, 32) and not down.any()


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu, and llama.cpp computes silu"),
        ("qwen3", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type dynamic"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "mscale": 0.7}},
            "rope_parameters.mscale",
        ),
        ("gemma3", {"query_pre_attn_scalar": 7}, "its attention is scaled by 7, and llama.cpp takes 32"),
        ("qwen3", {"attention_bias": True}, r"no place for model\.layers\.0\.self_attn\.k_proj\.bias"),
        ("gemma2", {"final_logit_softcapping": None}, "has no such cap"),
        (
            "gemma2",
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "every n-th block a view without window",
        ),
    ],
)
def test_what_the_runtime_does_not_compute_is_refused_by_name(
    name: str, values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=message):
        written(tiny(name, **values), tmp_path)


def test_other_architectures_are_refused_with_those_that_can_be_written(tmp_path: Path) -> None:
    config = transformers.GPTNeoXConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=ROWS
    )
    with pytest.raises(UnsupportedArchitectureError, match=r"gpt_neox: .* are gemma2, gemma3_text, llama, mistral"):
        written(transformers.GPTNeoXForCausalLM(config), tmp_path)


def keys_of(tokenizer: transformers.PreTrainedTokenizerFast, folder: Path) -> dict[str, Any]:
    """Keys of a tokenizer, without what they all begin with."""
    tokenizer.save_pretrained(folder)
    return {key.removeprefix("tokenizer.ggml."): value for key, value in tokenizer_keys(folder, ROWS).items()}


FIRST = {id(kind): name for name, kind in reversed(PRETOKENIZERS.items())}.values()
SAME = {"gigachat": "gpt-2", "bailingmoe": "stablelm2"}
"""Names of pre-tokenizers that cut every text alike."""


@pytest.mark.parametrize("name", FIRST)
def test_pre_tokenizers_are_known_by_what_they_do(name: str, tmp_path: Path) -> None:
    kind = PRETOKENIZERS[name]
    tokenizer = byte_level(kind.make(), normalizer=kind.normalizer(), whole_words=kind.whole_words)
    assert PRETOKENIZERS[keys_of(tokenizer, tmp_path)["pre"]] is PRETOKENIZERS[SAME.get(name, name)]


def test_a_pattern_spelled_otherwise_is_recognized(tmp_path: Path) -> None:
    """Published tokenizers of Llama 3 write the contractions one way, those of others another."""
    pattern = (
        r"(?i:'[sdmt]|'ll|'ve|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    cut = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    assert keys_of(byte_level(cut, whole_words=True), tmp_path)["pre"] == "llama3"


def test_tokens_are_told_by_kind(tmp_path: Path) -> None:
    found = keys_of(byte_level(), tmp_path)
    kinds = dict(zip(found["tokens"], found["token_type"], strict=True))
    assert (kinds["<s>"], kinds["<tool>"], kinds["he"], kinds["[PAD511]"]) == (3, 4, 1, 5)
    assert (found["bos_token_id"], found["eos_token_id"]) == (0, 1)
    assert (found["add_bos_token"], found["add_eos_token"]) == (True, False)
    assert "<|chat|>" in found["tokenizer.chat_template"]
    assert "padding_token_id" not in found


@pytest.mark.parametrize(
    ("name", "prefix"), [("llama", True), ("llama", False), ("phi3", True), ("gemma2", False), ("gemma3", False)]
)
def test_sentencepiece_is_carried_over(name: str, prefix: bool, tmp_path: Path) -> None:
    model, tokenizer = tiny(name), sentencepiece(prefix=prefix)
    folder = folder_of(model, tmp_path / "model", tokenizer)
    write_gguf(folder, tmp_path / "x.gguf", {}, name="tiny")  # compares tokens with those of the original
    found = read_gguf_header(tmp_path / "x.gguf", whole="tokenizer.").metadata
    kinds = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"], strict=True))
    assert (kinds["<unk>"], kinds["<s>"], kinds["<0x0A>"], kinds["the"]) == (2, 3, 6, 1)
    assert found["tokenizer.ggml.add_space_prefix"] is prefix
    scores = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
    assert scores["he"] > scores["the"] > scores["▁the"] > scores["z"]


def test_merges_that_scores_cannot_tell_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tiny("llama"), tmp_path / "model", sentencepiece(every_split=False))
    with pytest.raises(ModelError, match=r"what can be carried over cuts .* into other tokens"):
        write_gguf(folder, tmp_path / "x.gguf", {}, name="tiny")


def unigram() -> transformers.PreTrainedTokenizerFast:
    tokenizer = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def enclosed() -> transformers.PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=["<|chat|>", "$A"], special_tokens=[("<|chat|>", tokenizer.convert_tokens_to_ids("<|chat|>"))]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (unigram, "its model is Unigram, and only BPE"),
        (enclosed, "other tokens around a text than a start and an end token"),
        (lambda: byte_level(normalizer=normalizers.Lowercase()), r"normalizes text \(Lowercase\)"),
        (
            lambda: byte_level(
                pre_tokenizers.Sequence(
                    [pre_tokenizers.Split(Regex("[aeiou]"), "isolated"), pre_tokenizers.ByteLevel()]
                )
            ),
            "cuts text like none that llama.cpp has a name for",
        ),
    ],
)
def test_tokenizers_that_cannot_be_carried_over_are_refused(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        keys_of(make(), tmp_path)


def test_more_tokens_than_embeddings_are_refused(tmp_path: Path) -> None:
    byte_level().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"is number 3\d\d, and the model embeds 100 tokens"):
        tokenizer_keys(tmp_path, 100)


def test_tokens_that_changed_on_the_way_are_noticed(tmp_path: Path) -> None:
    folder = folder_of(tiny("llama"), tmp_path / "model")
    write_gguf(folder, tmp_path / "x.gguf", {}, name="tiny")
    definition = folder / "tokenizer.json"
    content = json.loads(definition.read_text(encoding="utf-8"))
    content["model"]["merges"] = content["model"]["merges"][5:]
    definition.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ModelError, match="into other tokens"):
        check_tokens(tmp_path / "x.gguf", folder, ROWS)
