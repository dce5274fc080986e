"""A model folder made of links into another one, or of converted weights."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors.torch import save_file

from evopress.errors import ModelError
from evopress.models.checkpoint import INDEX, Checkpoint, open_safetensors, read_json
from evopress.models.hub import SMALL_FILES

_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def link_folder(source: Path, folder: Path, dtype: str, *, code: bool = False) -> None:
    """Copy the small files of ``source`` and link its weights, or convert them unless ``dtype`` is `source`.

    Raises:
        ModelError: no such folder, no safetensors, or a damaged file.
    """
    if not source.is_dir():
        raise ModelError(f"{source}: no such folder; check model.path")
    read_json(source / "config.json")
    checkpoint = Checkpoint(source)
    for path in sorted(source.iterdir()):
        if path.is_file() and any(
            fnmatch(path.name, pattern) for pattern in (*SMALL_FILES, *(["*.py"] if code else []))
        ):
            shutil.copyfile(path, folder / path.name)
    for path in checkpoint.files:
        if dtype == "source":
            (folder / path.name).symlink_to(path.resolve())
        else:
            _convert(path, folder / path.name, _TORCH_DTYPES[dtype])
    if dtype != "source":
        _state_dtype(folder, dtype)


def _convert(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Write one file of weights with those of floating point in ``dtype``."""
    with open_safetensors(source) as stream:
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a mapping)
    converted = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    save_file(converted, target, metadata={"format": "pt"})


def _state_dtype(folder: Path, dtype: str) -> None:
    """Make config.json and the index tell the converted weights' type and size."""
    config = read_json(folder / "config.json")
    for section in (config, config.get("text_config")):
        if isinstance(section, dict):
            section.pop("torch_dtype", None)
            section["dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX)
        index["metadata"] = {"total_size": sum(Checkpoint(folder).sizes().values())}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
