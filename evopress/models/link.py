"""A model folder made of links into another one, or of converted weights."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from evopress.models.checkpoint import INDEX, Checkpoint, open_safetensors, read_json, read_tensor
from evopress.models.companions import companions
from evopress.util.errors import ModelError

_ADAPTER = "adapter_config.json"
_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def link_folder(source: Path, folder: Path, dtype: str, *, code: bool = False) -> None:
    """Copy the companions of ``source`` and link its weights, or convert them unless ``dtype`` is `source`.

    Raises:
        ModelError: no such folder, no safetensors, or a damaged file.
    """
    if not source.is_dir():
        raise ModelError(f"{source}: no such folder; check model.path")
    read_json(source / "config.json")
    checkpoint = Checkpoint(source)
    for path in companions(source, code=code):
        _require_own(source / path, source)
        (folder / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / path, folder / path)
    for path in checkpoint.files:
        if dtype == "source":
            (folder / path.name).symlink_to(path.resolve())
        else:
            _convert(path, folder / path.name, _TORCH_DTYPES[dtype])
    if dtype != "source":
        _state_dtype(folder, dtype)


def _require_own(path: Path, source: Path) -> None:
    """Check that a small file, which compressed models will hold a copy of, belongs to the model.

    Links are common in the hub's cache, where all files of a model lie in one folder of blobs. Elsewhere a link could
    name any file of the user's. (Weights may be links: nothing but tensors is read of them.)
    """
    if path.name == _ADAPTER:
        raise ModelError(
            f"{path}: this is an adapter to another model, which loading would put in its place; merge the two first"
        )
    inside = [source.resolve()]
    if source.resolve().parent.name == "snapshots":
        inside.append(source.resolve().parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(folder) for folder in inside):
        raise ModelError(
            f"{path}: links to {path.resolve()}, outside of the model's folder; copy that file into the folder if it "
            "belongs to the model"
        )


def _convert(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Write one file of weights with those of floating point in ``dtype``."""
    with open_safetensors(source) as stream:
        names = list(stream.keys())
        converted = {name: read_tensor(stream, name, "cpu", dtype, source) for name in names}
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
