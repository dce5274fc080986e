"""What a model's config.json or GGUF header says, read without torch: every parse of the workflow asks."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evopress.artifacts.paths import Run
from evopress.config.model import FolderModel, GgufModel, HubModel, ModelSettings
from evopress.models.block_count import hub_config
from evopress.util.errors import EvopressError

_GGUF_KEYS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "vocab_size": "vocab_size",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "head_dim": "attention.key_length",
    "num_experts": "expert_count",
}


def model_config(settings: ModelSettings, run: Run) -> dict[str, Any]:
    """The model's config (of its text part, where there are several), in the words of transformers.

    Of a wheel, it is known once the model stage has ended. Empty where nothing can be read: whoever needs more will
    say what is wrong.
    """
    try:
        if isinstance(settings, GgufModel):
            return _of_gguf(Path(settings.path))
        return _of_json(_path(settings, run))
    except (EvopressError, OSError, ValueError, RecursionError):
        return {}


def _path(settings: ModelSettings, run: Run) -> Path:
    if isinstance(settings, FolderModel):
        return Path(settings.path) / "config.json"
    if isinstance(settings, HubModel) and settings.blocks is None:  # else it may not be meant to be fetched yet
        return hub_config(settings)
    return run.model / "config.json"


def _of_json(path: Path) -> dict[str, Any]:
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, Mapping):
        return {}
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, Mapping) else dict(config)


def _of_gguf(path: Path) -> dict[str, Any]:
    from evopress.models.gguf_header import read_gguf_header

    header = read_gguf_header(path).metadata
    architecture = header.get("general.architecture")
    named = {name: header.get(f"{architecture}.{key}") for name, key in _GGUF_KEYS.items()}
    return {"model_type": architecture} | {name: value for name, value in named.items() if value is not None}


def size(config: Mapping[str, Any], key: str) -> int | None:
    """A positive number of the config, or None."""
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
