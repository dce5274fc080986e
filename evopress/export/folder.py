"""A model folder in the hub's layout: weights as safetensors shards, and what lies beside them.

Weights are written with no more than one shard in memory. What lies beside them (config, tokenizer, chat template,
license, code) is copied byte by byte.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from evopress.artifacts.paths import CARD, LEVEL_MAP
from evopress.artifacts.tensors import save
from evopress.models.checkpoint import INDEX, SINGLE, Checkpoint

_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".npz",
    ".index.json",
)
Replace = Callable[[str, torch.Tensor], torch.Tensor]
"""Gives the tensor to store under a name, given the one that the dense checkpoint stores there."""
Parts = Callable[[str, torch.Tensor], Mapping[str, torch.Tensor]]
"""Gives all tensors to store in the place of one, by their names."""


def companion_files(folder: Path) -> Iterator[Path]:
    """Paths, relative to ``folder``, of its files that are neither weights, nor hidden, nor of a model card."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if (
            path.is_file()
            and not hidden
            and not path.name.endswith(_WEIGHTS)
            and str(relative) not in (CARD, LEVEL_MAP)
        ):
            yield relative


def copy_companions(source: Path, target: Path) -> None:
    """Copy those files, following links, byte by byte.

    Raises:
        OSError: the disk is full, or a file cannot be read.
    """
    for relative in companion_files(source):
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / relative, target / relative)


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Fill shards with names, in order, up to ``limit`` bytes each; a larger tensor gets a shard of its own.

    Args:
        sizes: bytes of each tensor.
        limit: bytes of tensors a shard may hold.
    """
    shards: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not shards or filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def shard_names(count: int) -> list[str]:
    """File names of ``count`` shards, as transformers looks for them."""
    if count == 1:
        return [SINGLE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_weights(
    checkpoint: Checkpoint, folder: Path, names: Mapping[str, str], replace: Replace, shard_bytes: int
) -> None:
    """Write tensors of ``checkpoint`` into ``folder``, each passed through ``replace``.

    What the checkpoint ties (a head that is not stored) stays tied.

    Args:
        checkpoint: of the dense model.
        folder: gets the shards.
        names: name to store each tensor under, by its name in the checkpoint; those not named are left out.
        replace: must keep sizes.
        shard_bytes: bytes of tensors a shard may hold.

    Raises:
        OSError: the disk is full.
        ArtifactError: a file cannot be written.
        ModelError: the checkpoint is damaged.
    """
    sizes = {name: size for name, size in checkpoint.sizes().items() if name in names}
    write_tensors(checkpoint, folder, sizes, lambda name, dense: {names[name]: replace(name, dense)}, shard_bytes)


def write_tensors(
    checkpoint: Checkpoint, folder: Path, sizes: Mapping[str, int], parts: Parts, shard_bytes: int
) -> None:
    """Write what takes the place of tensors of ``checkpoint`` into ``folder``.

    Args:
        checkpoint: of the dense model.
        folder: gets the shards.
        sizes: bytes of all that ``parts`` gives for a tensor, by its name in the checkpoint; the others are left out.
        parts: makes it.
        shard_bytes: bytes of tensors a shard may hold.

    Raises:
        OSError: the disk is full.
        ArtifactError: a file cannot be written.
        ModelError: the checkpoint is damaged.
    """
    shards = plan_shards(sizes, shard_bytes)
    files = shard_names(len(shards))
    stored: list[list[str]] = []
    for file, members in zip(files, shards, strict=True):
        dense = checkpoint.read(members)
        tensors = {new: tensor for name in members for new, tensor in parts(name, dense.pop(name)).items()}
        save(tensors, folder / file, metadata={"format": "pt"})
        stored.append(list(tensors))
    if len(shards) > 1:
        _write_index(folder / INDEX, files, stored, sum(sizes.values()))


def _write_index(path: Path, files: Sequence[str], shards: Sequence[Sequence[str]], total: int) -> None:
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
