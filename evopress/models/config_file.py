"""What a model's config.json or GGUF header says, read without torch: every parse of the workflow asks."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evopress.artifacts.manifest import load_manifest
from evopress.artifacts.paths import Run
from evopress.config.model import MOST_BLOCKS, HubModel, ModelSettings, not_a_folder, other_layout
from evopress.models.gguf_header import parts_of, read_gguf_header, whole_header
from evopress.util.errors import ConfigError, EvopressError, ModelError, brief

_BLOCKS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_GGUF_KEYS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "vocab_size": "vocab_size",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "head_dim": "attention.key_length",
    "num_experts": "expert_count",
}


def count_blocks(settings: ModelSettings) -> int:
    """`model.blocks` if set, else the number in the model's config.json or GGUF header.

    A hub model's config.json is taken from the local cache if it is there, and fetched otherwise.

    Raises:
        ConfigError: the number must be set, since it cannot be read beforehand.
        ModelError: a local file is missing or damaged.
    """
    if settings.blocks is not None:
        return settings.blocks
    path = source_file(settings)
    if path is None:
        raise ConfigError("model.blocks: set the number of transformer blocks; a wheel cannot be read beforehand")
    config = read_model_config(path, gguf=settings.quantized)
    counts = [count for key in _BLOCKS if isinstance(count := config.get(key), int) and count > 0]
    if not counts:
        raise ConfigError(f"model.blocks: {path} does not give the number of transformer blocks; set it")
    if counts[0] > MOST_BLOCKS:
        raise ModelError(f"{path}: asks for {counts[0]} blocks, and no model has more than {MOST_BLOCKS}")
    return counts[0]


def model_config(settings: ModelSettings, run: Run) -> dict[str, Any]:
    """The model's config (of its text part, where there are several), in the words of transformers.

    Of a wheel, it is known once the model stage has ended. Empty where nothing can be read: whoever needs more will
    say what is wrong.
    """
    try:
        path = None if settings.config_comes_late else source_file(settings)
        return (
            read_model_config(run.model / "config.json")
            if path is None
            else read_model_config(path, gguf=settings.quantized)
        )
    except (EvopressError, OSError):
        return {}


def size(config: Mapping[str, Any], key: str) -> int | None:
    """A positive number of the config, or None."""
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def source_file(settings: ModelSettings) -> Path | None:
    """The config.json or the GGUF file that the model comes with; None of a wheel, which has to be fetched first.

    Raises:
        ConfigError: the config.json of a hub model is not in the cache, and cannot be fetched.
    """
    if isinstance(settings, HubModel):
        return hub_config(settings)
    return settings.local if settings.quantized or settings.local is None else settings.local / "config.json"


def hub_config(settings: HubModel) -> Path:
    """config.json of a hub model, from the cache or fetched.

    Raises:
        ConfigError: it cannot be fetched.
    """
    from huggingface_hub import try_to_load_from_cache

    from evopress.models.download import fetch_config

    cached = try_to_load_from_cache(settings.id, "config.json", revision=settings.revision)
    if isinstance(cached, str):
        return Path(cached)
    try:
        return fetch_config(settings)
    except Exception as error:  # the hub's client raises errors of several libraries
        raise ConfigError(
            f"model.blocks: config.json of {settings.id} cannot be fetched ({brief(error)}); set the number of blocks, "
            "or fetch the model beforehand with `hf download`"
        ) from error


def read_model_config(path: Path, *, gguf: bool = False) -> dict[str, Any]:
    """What a config.json (its text part, where there are several), or the header of a GGUF file, says of a model.

    Raises:
        ModelError: the file is missing or damaged.
    """
    if gguf:
        header = read_gguf_header(path).metadata
        kind = header.get("general.architecture")
        named = {name: header.get(f"{kind}.{key}") for name, key in _GGUF_KEYS.items()}
        return {"model_type": kind} | {name: value for name, value in named.items() if value is not None}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; {other_layout(path.parent)}") from None
    except NotADirectoryError:
        raise ModelError(f"{path.parent}: {not_a_folder(path.parent)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: damaged, not JSON ({error}); fetch the model again") from error
    if not isinstance(config, dict):
        return {}
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, dict) else config


def prepared_model(settings: ModelSettings, run: Run) -> dict[str, Any] | None:
    """Manifest of the model that these settings have made in the run's folder; None where there is none yet."""
    try:
        manifest = load_manifest(run.model_manifest, "model")
        made, asked = dict(manifest["source"]), json.loads(settings.model_dump_json())
    except (EvopressError, OSError, KeyError, TypeError, ValueError):
        return None
    no_part = {"blocks": None, "base_model": None}  # of what is made
    return manifest if made | no_part == asked | no_part else None


def source_bytes(settings: ModelSettings, run: Run) -> int | None:
    """Bytes of the quantized file that the model comes from; None where it comes from none, or that is not known yet.

    That of a wheel is known once the model stage has ended.
    """
    prepared = prepared_model(settings, run)
    if prepared is not None or not settings.quantized or settings.local is None:
        return (prepared or {}).get("origin", {}).get("gguf_bytes")
    try:
        return sum(part.stat().st_size for part in parts_of(settings.local))
    except (EvopressError, OSError):
        return None


def dense_sizes(settings: ModelSettings, run: Run) -> tuple[int, int] | None:
    """Bytes and number of the parameters of a model that comes from a GGUF file; None where that is not known yet."""
    try:
        if prepared_model(settings, run) is not None:
            from evopress.models.checkpoint import Checkpoint

            checkpoint = Checkpoint(run.model)
            return sum(checkpoint.sizes().values()), sum(checkpoint.elements().values())
    except (EvopressError, OSError):
        return None
    parameters = gguf_parameters(settings)
    return None if parameters is None else (parameters * (4 if settings.dtype == "float32" else 2), parameters)


def gguf_parameters(settings: ModelSettings) -> int | None:
    """Parameters of the model in a GGUF file; None of other sources, of a wheel, and where it cannot be read."""
    if not settings.quantized or settings.local is None:
        return None
    try:
        tensors = whole_header(settings.local).tensors
    except (EvopressError, OSError):
        return None
    return sum(math.prod(tensor.shape) for name, tensor in tensors.items() if not name.startswith("rope_"))
