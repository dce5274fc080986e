"""What a model's config.json or GGUF header says, read without torch: every parse of the workflow asks."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evopress.artifacts.manifest import load_manifest
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


def prepared_model(settings: ModelSettings, run: Run) -> dict[str, Any] | None:
    """Manifest of the model that these settings have made in the run's folder; None where there is none yet."""
    try:
        manifest = load_manifest(run.model_manifest, "model")
        made, asked = dict(manifest["source"]), json.loads(settings.model_dump_json())
    except (EvopressError, OSError, KeyError, TypeError, ValueError):
        return None
    return manifest if made | {"blocks": None} == asked | {"blocks": None} else None


def source_bytes(settings: ModelSettings, run: Run) -> int | None:
    """Bytes of the quantized file that the model comes from; None where it comes from none, or that is not known yet.

    That of a wheel is known once the model stage has ended.
    """
    prepared = prepared_model(settings, run)
    if prepared is not None or not isinstance(settings, GgufModel):
        return (prepared or {}).get("origin", {}).get("gguf_bytes")
    from evopress.models.gguf_parts import parts_of

    try:
        return sum(part.stat().st_size for part in parts_of(Path(settings.path)))
    except (EvopressError, OSError):
        return None


def dense_sizes(settings: ModelSettings, run: Run) -> tuple[int, int] | None:
    """Bytes and number of the parameters of a model that comes from a GGUF file; None where that is not known yet."""
    try:
        if prepared_model(settings, run) is not None:
            from evopress.models.checkpoint import Checkpoint

            checkpoint = Checkpoint(run.model)
            return sum(checkpoint.sizes().values()), sum(checkpoint.elements().values())
        if not isinstance(settings, GgufModel):
            return None
        from evopress.models.gguf_parts import whole_header

        tensors = whole_header(Path(settings.path)).tensors
    except (EvopressError, OSError):
        return None
    parameters = sum(math.prod(tensor.shape) for name, tensor in tensors.items() if not name.startswith("rope_"))
    return parameters * (4 if settings.dtype == "float32" else 2), parameters


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
