"""Tiny random models of every architecture that is tested, a few hundred kilobytes each."""

from pathlib import Path

import torch
import transformers

LENGTH = 12
"""Tokens of a test sequence: longer than the sliding windows below."""

_SIZES = {
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
_GEMMA = {**_SIZES, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
_OPT = {
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 2,
}

CONFIGS: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", _SIZES),
    "llama-tied": ("LlamaConfig", {**_SIZES, "tie_word_embeddings": True}),
    "llama-bias": ("LlamaConfig", {**_SIZES, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {**_SIZES, "sliding_window": 4}),
    "phi3": ("Phi3Config", {**_SIZES, "sliding_window": None}),
    "phi3-sliding": ("Phi3Config", {**_SIZES, "sliding_window": 4}),
    "phi3-longrope": (
        "Phi3Config",
        {
            **_SIZES,
            "sliding_window": None,
            "original_max_position_embeddings": 8,  # a test sequence takes the long factors, a single token the short
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.0, 2.0, 4.0, 8.0],
            },
        },
    ),
    "qwen2": ("Qwen2Config", _SIZES),
    "qwen2-sliding": (
        "Qwen2Config",
        {**_SIZES, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {**_SIZES, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**_GEMMA, "layer_types": _ALTERNATING}),
    "gemma3": ("Gemma3TextConfig", {**_GEMMA, "layer_types": _ALTERNATING}),
    "phi": ("PhiConfig", {**_SIZES, "num_key_value_heads": 4}),
    "gpt-neox": ("GPTNeoXConfig", {**_SIZES, "use_parallel_residual": True}),
    "gpt-neox-sequential": ("GPTNeoXConfig", {**_SIZES, "use_parallel_residual": False}),
    "opt": ("OPTConfig", _OPT),
    "opt-350m": ("OPTConfig", {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16}),
}

_OLD = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MORE_CONFIGS: dict[str, tuple[str, dict]] = {
    # some weights of their blocks lie outside linear layers
    "cohere": ("CohereConfig", {**_SIZES, "use_qk_norm": True}),
    "qwen3.5": (
        "Qwen3_5TextConfig",
        {**_SIZES, **_DELTA, "head_dim": 8, "layer_types": ["linear_attention", "linear_attention", "full_attention"]},
    ),
    "lfm2": ("Lfm2Config", {**_SIZES, "layer_types": ["conv", "full_attention", "conv"]}),
    # blocks return attention weights, too
    "gptj": ("GPTJConfig", {**_OLD, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4}),
    # biases and masks that serve one sequence only; the residual stream is added inside the modules
    "bloom": ("BloomConfig", {**_OLD, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    # a state for all blocks, which they leave alone in this size
    "gemma4": (
        "Gemma4TextConfig",
        {
            **_SIZES,
            "head_dim": 8,
            "global_head_dim": 8,
            "sliding_window": 4,
            "layer_types": [*_ALTERNATING[:2], "full_attention"],
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
        },
    ),
}
"""Architectures that are unlike the others in one way or another."""

OUTPUT_LAYERS = {"attn": ("o_proj", "out_proj", "dense"), "mlp": ("down_proj", "fc2", "dense_4h_to_h")}
"""Last parts of the names of the layers whose output is that of a module."""


def build(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A float32 model with random weights, large enough that masks and soft-capping show in the logits."""
    kind, values = {**CONFIGS, **MORE_CONFIGS}[name]
    torch.manual_seed(seed)
    config = getattr(transformers, kind)(**values, initializer_range=0.2) if kind != "OPTConfig" else None
    config = config or transformers.OPTConfig(**values, init_std=0.2)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases start as ones and zeros, which would hide a mix-up
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.requires_grad_(False)


def save(model: transformers.PreTrainedModel, folder: Path, **options: object) -> Path:
    """Save ``model`` as a Hugging Face folder."""
    model.save_pretrained(folder, **options)
    return folder


def tokens(count: int = 3, length: int = LENGTH, vocabulary: int = 96, seed: int = 1) -> torch.Tensor:
    """Random token ids [count, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (count, length), generator=generator)
