"""Shapes of large models, and settings that plan them."""

import json
from pathlib import Path

import yaml

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
SHAPES = {
    "7B": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "70B": {
        **_LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
}
"""config.json of Llama-2-7B and of Llama-3-70B, as far as it decides sizes."""


def write_settings(folder: Path, size: str, **changes: object) -> Path:
    """Settings that stand alone, with the quantization row of the design's table, for a model of the given size."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(SHAPES[size]))
    text = {"source": "fineweb_edu", "tokens": 1 << 19, "sequence_length": 4096}
    evolution = {"generations": 150, "offspring": 128, "survivors": [16, 4, 1], "tokens": [2048, 16384, 131072]}
    values = {
        "complete": True,
        "name": "plan",
        "model": {"source": "folder", "path": str(folder / "model")},
        "data": {"calibration": text, "search": text, "evaluation": {"wikitext2": {"source": "wikitext2"}}},
        "variants": {"gptq": {"method": "gptq", "bits": [2, 3, 4, 5, 6], "group_size": 128}},
        "searches": {"q3": {"strategy": "evolution", "variants": "gptq", "target": 3.0, **evolution}},
        **changes,
    }
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
