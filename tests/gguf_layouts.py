"""Tiny random models, and tokenizers for them, in the layouts that are written as GGUF."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
import transformers
from gguf import GGMLQuantizationType
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from evopress.export.gguf.file import Packed

SIZES: dict[str, Any] = {
    "hidden_size": 256,  # a block of K types
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-3,  # large enough to be missed
    "vocab_size": 512,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "layer_types": ALTERNATING}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "attention_factor": 1.2,
}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0 + 0.01 * pair for pair in range(32)],
    "long_factor": [1.0 + 0.1 * pair for pair in range(32)],
}
_LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
_GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-large-heads": ("Llama", {"head_dim": 128}),
    "llama-llama3": ("Llama", {"rope_parameters": _LLAMA3}),
    "llama-linear": ("Llama", {"rope_parameters": _LINEAR}),
    "llama-yarn": ("Llama", {"rope_parameters": _YARN}),
    "llama-longrope": ("Llama", {"rope_parameters": {**_LONG, "factor": 4.0}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 32}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "phi3-window": ("Phi3", {"sliding_window": 32}),
    "phi3-longrope": (
        "Phi3",
        {"rope_parameters": _LONG, "original_max_position_embeddings": 16, "sliding_window": None},
    ),
    "phi3-partial": ("Phi3", {"partial_rotary_factor": 0.5, "tie_word_embeddings": True, "sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": _YARN}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {**_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3Text", {**_GEMMA, "rope_parameters": _GEMMA3_ROPE}),
    "gemma3-default-windows": ("Gemma3Text", {**_GEMMA, "layer_types": None, "num_hidden_layers": 7}),
}
"""Class of the config without its ending, and what it has beside ``SIZES``."""


def tiny(name: str, **values: Any) -> transformers.PreTrainedModel:
    """A float32 model whose logits are spread enough that every part of it shows in them."""
    kind, own = TINY[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **own, **values}, initializer_range=0.06)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms and biases start as ones and zeros, which would hide a mix-up
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def tokens() -> list[int]:
    """A sequence longer than the narrowest window and the shortest original length."""
    return torch.randint(3, 300, (24,), generator=torch.Generator().manual_seed(1)).tolist()


def packed_weights(model: transformers.PreTrainedModel, kind: GGMLQuantizationType) -> dict[str, Packed]:
    """Blocks for the linear layers that can have the type; the model gets the weights that they stand for."""
    packed, random = {}, np.random.default_rng(0)
    for name, parameter in model.named_parameters():
        whole_blocks = parameter.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        if parameter.ndim == 2 and ".layers." in name and whole_blocks:
            blocks = _blocks(parameter.numpy(), kind, random)
            parameter.copy_(torch.from_numpy(gguf.dequantize(blocks, kind)))
            packed[name] = Packed(blocks, kind)
    return packed


def _blocks(weight: np.ndarray, kind: GGMLQuantizationType, random: np.random.Generator) -> np.ndarray:
    """Of `weight`, or, where the library cannot quantize to the type, any with weights of its size."""
    if kind != GGMLQuantizationType.Q4_K:
        return gguf.quantize(weight, kind)
    shape = gguf.quant_shape_to_byte_shape(weight.shape, kind)
    blocks = random.integers(0, 256, shape, np.uint8).reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])
    scales = (np.array([0.005, 0.0375]) * weight.std()).astype(np.float16)  # of the steps, and of the minima
    blocks[:, :4] = scales.view(np.uint8)
    return blocks.reshape(shape)


def folder_of(
    model: transformers.PreTrainedModel,
    folder: Path,
    tokenizer: transformers.PreTrainedTokenizerFast | None = None,
) -> Path:
    """Save the model and a tokenizer; a byte-level one unless given."""
    model.save_pretrained(folder)
    (tokenizer or byte_level()).save_pretrained(folder)
    return folder


_TEXT = ["the quick brown fox jumps over the lazy dog's 1234 tails", "def f(x):\n    return x + 1\n", "Häuser und Öfen"]


def byte_level(
    pre_tokenizer: pre_tokenizers.PreTokenizer | None = None,
    *,
    normalizer: normalizers.Normalizer | None = None,
    whole_words: bool = False,
    bos: bool = True,
    **special: Any,
) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE trained on a few lines, with tokens at both ends, one for chats and one of the user."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=whole_words))
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.add_special_tokens([AddedToken("<|chat|>", special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return _wrapped(tokenizer, bos, **special)


def sentencepiece(*, prefix: bool = True, every_split: bool = True) -> transformers.PreTrainedTokenizerFast:
    """A BPE over characters with bytes to fall back on, as Llama 2, Mistral and Gemma have it.

    Args:
        prefix: whether texts begin with a space.
        every_split: whether a token may be made of any two that spell it, as in SentencePiece.
    """
    joined = ["he", "th", "the", "▁the", "qu", "ick", "ic", "in", "ing", "▁a"]
    letters = [chr(code) for code in range(33, 127)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), "▁", *letters, *joined]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    merges = [
        (token[:at], token[at:])
        for token in joined
        for at in range(1, len(token))
        if token[:at] in vocabulary and token[at:] in vocabulary
    ]
    if not every_split:
        merges = [merge for merge in merges if "".join(merge) != "the" or merge[0] == "t"]
        merges = [merge for merge in merges if "".join(merge) != "th"]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(model)
    spaces = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaces] if prefix else spaces)
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens[:3]])
    return _wrapped(tokenizer, bos=True, unk_token="<unk>")


def _wrapped(tokenizer: tokenizers.Tokenizer, bos: bool, **special: Any) -> transformers.PreTrainedTokenizerFast:
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=["<s>", "$A"], special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        chat_template="{% for message in messages %}<|chat|>{{ message.content }}{% endfor %}",
        **special,
    )
