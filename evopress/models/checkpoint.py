"""Tensors of a Hugging Face folder by name, memory-mapped, without building the model."""

import json
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from evopress.config.model import other_layout
from evopress.util.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FORMER_NAMES = {"lm_head.weight": "embed_out.weight"}
"""Names of parameters under which checkpoints store them still (GPT-NeoX), whatever transformers calls them now."""
_FORMER_PREFIXES = (
    ("model.language_model.", "language_model.model."),
    ("model.", "model.language_model."),
    ("model.", "language_model.model."),
)
"""The same for all tensors of the text model beside a vision tower (Gemma 3, Qwen3.5, Llama 4)."""
_PICKLED = ("bin", "pt", "pth", "ckpt", "pkl", "pickle")


class Checkpoint:
    """The safetensors of a model folder, one file or several with an index.

    A name that is not stored resolves to the one stored name that differs from it by a leading prefix only: published
    checkpoints of OPT lack `model.`, and multimodal models put `language_model.` before the text model's names.

    Raises:
        ModelError: no safetensors, or an index or file that cannot be read; the message names the file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._files = _weight_files(self.folder)
        self._by_suffix: dict[str, list[str]] | None = None

    @property
    def files(self) -> list[Path]:
        """The safetensors files, sorted by name."""
        return [self.folder / file for file in sorted(set(self._files.values()))]

    def names(self) -> list[str]:
        """Names of the stored tensors, sorted."""
        return sorted(self._files)

    def stored_name(self, name: str) -> str | None:
        """Name under which the model's parameter ``name`` is stored, or None if it is not."""
        if name in self._files:
            return name
        if (former := _FORMER_NAMES.get(name)) in self._files:
            return former
        for now, before in _FORMER_PREFIXES:
            if name.startswith(now) and (former := before + name.removeprefix(now)) in self._files:
                return former
        found = [stored for stored in self._suffixes().get(name.split(".")[-1], []) if _same_but_prefix(stored, name)]
        return found[0] if len(found) == 1 else None

    def read(
        self, names: Iterable[str], *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        """Read tensors, keyed by the names asked for; ``dtype`` converts those of floating point.

        On the CPU, and without conversion, tensors are views of the mapped file: no memory is taken beforehand.

        Raises:
            ModelError: a tensor is missing, or its file cannot be read.
        """
        stored = {name: self._resolve(name) for name in names}
        by_file: dict[str, list[str]] = {}
        for name, key in stored.items():
            by_file.setdefault(self._files[key], []).append(name)
        tensors = {}
        for file, wanted in by_file.items():
            with open_safetensors(self.folder / file) as stream:
                for name in wanted:
                    tensors[name] = read_tensor(stream, stored[name], device, dtype, self.folder / file)
        return tensors

    def sizes(self) -> dict[str, int]:
        """Bytes of each stored tensor, without reading it."""
        return {name: tensor.nbytes for name, tensor in self.read(self.names()).items()}

    def elements(self) -> dict[str, int]:
        """Numbers in each stored tensor, without reading it."""
        return {name: tensor.numel() for name, tensor in self.read(self.names()).items()}

    def floating_dtype(self) -> torch.dtype:
        """Type of the first tensor of floating point, as `from_pretrained` takes it where the config names none.

        Raises:
            ModelError: there is none.
        """
        for file in self.files:
            with open_safetensors(file) as stream:
                for name in stream.keys():  # noqa: SIM118 (not a mapping)
                    tensor = read_tensor(stream, name, "cpu", None, self.folder / file)
                    if tensor.is_floating_point():
                        return tensor.dtype
        raise ModelError(f"{self.folder}: holds no weights of floating point; give an unquantized checkpoint")

    def _resolve(self, name: str) -> str:
        stored = self.stored_name(name)
        if stored is None:
            raise ModelError(f"{self.folder}: has no tensor {name!r}; the checkpoint is incomplete, fetch it again")
        return stored

    def _suffixes(self) -> dict[str, list[str]]:
        if self._by_suffix is None:
            self._by_suffix = {}
            for stored in self._files:
                self._by_suffix.setdefault(stored.split(".")[-1], []).append(stored)
        return self._by_suffix


def open_safetensors(path: Path) -> AbstractContextManager[Any]:
    """Open a safetensors file; its header is checked against its size, so a lying one allocates nothing.

    Raises:
        ModelError: missing, cut short or no safetensors.
    """
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        if path.is_symlink():
            raise ModelError(f"{path}: links to {path.readlink()}, which is gone; bring it back") from None
        raise ModelError(f"{path}: missing; fetch the model again") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: damaged or cut short ({error}); fetch the model again") from error


def read_tensor(
    stream: Any, name: str, device: str | torch.device, dtype: torch.dtype | None, path: Path
) -> torch.Tensor:
    """A tensor of an open file, converted if it is of floating point.

    Raises:
        ModelError: its type is none that torch has, or that can be converted.
    """
    try:
        tensor = stream.get_tensor(name)
        return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
    except (SafetensorError, NotImplementedError, TypeError) as error:
        raise ModelError(f"{path}: {name!r} cannot be read ({error}); give a checkpoint in 16 or 32 bits") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a model folder.

    Raises:
        ModelError: missing, or no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; {other_layout(path.parent)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: damaged, not JSON ({error}); fetch the model again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: damaged, not a JSON object; fetch the model again")
    return content


def _weight_files(folder: Path) -> dict[str, str]:
    """File of each stored tensor; the index wins where there is one, as in transformers' own order of names."""
    if (folder / SINGLE).exists() or (folder / SINGLE).is_symlink():
        with open_safetensors(folder / SINGLE) as stream:
            return dict.fromkeys(stream.keys(), SINGLE)
    if not (folder / INDEX).exists():
        raise ModelError(f"{folder}: holds neither {SINGLE} nor {INDEX}; {_advice(folder)}")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ModelError(f"{folder / INDEX}: damaged, no weight_map; fetch the model again")
    for file in set(weight_map.values()):
        if Path(file).name != file or "\0" in file:
            raise ModelError(
                f"{folder / INDEX}: names {file!r}, which lies outside the folder; do not trust this model"
            )
        if not file.endswith(".safetensors"):
            raise ModelError(f"{folder / INDEX}: names {file!r}, which is no safetensors file; {_advice(folder)}")
        with open_safetensors(folder / file) as stream:
            held = set(stream.keys())
        lost = sorted(name for name, where in weight_map.items() if where == file and name not in held)
        if lost:
            raise ModelError(f"{folder / file}: lacks {lost[0]!r}, which the index promises; fetch the model again")
    return dict(weight_map)


def _advice(folder: Path) -> str:
    pickled = sorted(path.name for suffix in _PICKLED for path in folder.glob(f"*.{suffix}"))
    if pickled:
        return f"its weights are pickled ({pickled[0]}), which can run code: convert them to safetensors first"
    return "give a folder with safetensors weights"


def _same_but_prefix(stored: str, name: str) -> bool:
    return stored.endswith("." + name) or name.endswith("." + stored)
