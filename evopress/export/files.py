"""What a model folder holds beside its weights: config, tokenizer, chat template, license, code."""

import shutil
from collections.abc import Iterator
from pathlib import Path

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


def companion_files(folder: Path) -> Iterator[Path]:
    """Paths, relative to ``folder``, of its files that are neither weights, nor hidden, nor the model card."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.is_file() and not hidden and not path.name.endswith(_WEIGHTS) and relative != Path("README.md"):
            yield relative


def copy_companions(source: Path, target: Path) -> None:
    """Copy those files, following links, byte by byte.

    Raises:
        OSError: the disk is full, or a file cannot be read.
    """
    for relative in companion_files(source):
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / relative, target / relative)
