"""config.json of the paper's models, as far as it decides shapes, and their ready configurations."""

import json
from pathlib import Path
from typing import Any

from evopress.workflow.settings import combined, read_yaml

PAPER = Path(__file__).resolve().parents[1] / "config" / "paper"

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
_LLAMA_3 = {
    **_LLAMA,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        **_LLAMA,
        "intermediate_size": 11008,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "llama-3-8b": {**_LLAMA_3, "max_position_embeddings": 8192},
    "llama-3.1-8b": {
        **_LLAMA_3,
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "mistral-7b-v0.3": {
        **_LLAMA,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "vocab_size": 32768,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
    "phi-3-medium": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_act": "silu",
        "hidden_size": 5120,
        "intermediate_size": 17920,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 10,
        "vocab_size": 32064,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64},
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "pad_token_id": 32000,
        "dtype": "bfloat16",
    },
}


def write_model_config(folder: Path, name: str) -> Path:
    """Folder of a model that has nothing but its config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODELS[name]))
    return folder


FAST = {family: PAPER / f"{family}-fast.yaml" for family in ("quantization", "sparsity")}
"""Laid over a family."""


def families(name: str) -> list[Path]:
    """Ready configurations of all families for a model."""
    depth = f"depth-{MODELS[name]['num_hidden_layers']}-blocks"
    return [PAPER / f"{family}.yaml" for family in ("quantization", "sparsity", depth)]


def paper_settings(name: str, folder: Path) -> dict[str, Any]:
    """A model's settings with all families, and the folder in the place of the hub."""
    overlays = [read_yaml(path) for path in (PAPER / f"{name}.yaml", *families(name))]
    return combined([*overlays, {"model": {"source": "folder", "path": str(folder)}}])
