"""Number of blocks of a model not yet prepared; imports nothing heavy, since every parse of the workflow asks."""

import json
from pathlib import Path
from typing import Any

from evopress.config.model import MOST_BLOCKS, FolderModel, GgufModel, HubModel, ModelSettings
from evopress.util.errors import ConfigError, ModelError, brief

_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def count_blocks(settings: ModelSettings) -> int:
    """`model.blocks` if set, else the number in the model's config.json or GGUF header.

    A hub model's config.json is taken from the local cache if it is there, and fetched otherwise.

    Raises:
        ConfigError: the number must be set, since it cannot be read beforehand.
        ModelError: a local file is missing or damaged.
    """
    if settings.blocks is not None:
        return settings.blocks
    if isinstance(settings, GgufModel):
        return _from_gguf(Path(settings.path))
    if isinstance(settings, FolderModel):
        return _from_config(Path(settings.path) / "config.json")
    if isinstance(settings, HubModel):
        return _from_config(hub_config(settings))
    raise ConfigError("model.blocks: set the number of transformer blocks; a wheel cannot be read beforehand")


def other_layout(folder: Path) -> str:
    """What to say of a folder that has no config.json."""
    if files := sorted(folder.glob("*.gguf")):
        return f"the folder holds a GGUF file: write `source: gguf` with the path of {files[0].name}"
    return "is this a folder in the Hugging Face layout?"


def not_a_folder(path: Path) -> str:
    """What to say of a file that is given as the folder of a model."""
    if path.suffix.lower() == ".gguf":
        return "is a GGUF file, not a folder; write `source: gguf`"
    return "is a file, not a folder; give the folder that holds config.json and the weights"


def _from_gguf(path: Path) -> int:
    from evopress.models.gguf_header import read_gguf_header

    header = read_gguf_header(path).metadata
    count = header.get(f"{header.get('general.architecture')}.block_count")
    if not isinstance(count, int) or not 0 < count <= MOST_BLOCKS:
        raise ConfigError(f"model.blocks: {path} does not give a usable number of blocks ({count}); set it")
    return count


def _from_config(path: Path) -> int:
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; {other_layout(path.parent)}") from None
    except NotADirectoryError:
        raise ModelError(f"{path.parent}: {not_a_folder(path.parent)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: damaged, not JSON ({error}); fetch the model again") from error
    for section in (config.get("text_config"), config) if isinstance(config, dict) else ():
        for key in _KEYS:
            count = section.get(key) if isinstance(section, dict) else None
            if isinstance(count, int) and count > MOST_BLOCKS:
                raise ModelError(f"{path}: {key} is {count}, and no model has more than {MOST_BLOCKS} blocks")
            if isinstance(count, int) and count > 0:
                return count
    raise ConfigError(f"model.blocks: {path} does not give the number of transformer blocks; set it")


def hub_config(settings: HubModel) -> Path:
    """config.json of a hub model, from the cache or fetched.

    Raises:
        ConfigError: it cannot be fetched.
    """
    from huggingface_hub import try_to_load_from_cache

    from evopress.models.hub import fetch_config

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
