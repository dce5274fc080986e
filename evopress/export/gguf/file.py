"""A whole GGUF file: header, tokenizer and tensors, of which no more than one is in memory at a time."""

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

from evopress.export.gguf.layouts import (
    STAND_IN,
    Absent,
    Layout,
    architecture_of,
    head_size,
    header_keys,
    layout_of,
    rope_tensors,
)
from evopress.export.gguf.vocabulary import check_tokens, tokenizer_keys
from evopress.models.checkpoint import Checkpoint
from evopress.models.gguf_weights import stored_names
from evopress.models.modules import ATTENTION, MLP
from evopress.models.skeleton import load_config, skeleton_of
from evopress.util.errors import ModelError, UnsupportedArchitectureError
from evopress.util.progress import log

_F32 = GGMLQuantizationType.F32
DENSE = (_F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16, GGMLQuantizationType.Q8_0)
"""Types that matrices can be stored as which are not given packed."""
_FROM_CARD = {
    "license": "general.license",
    "license_name": "general.license.name",
    "license_link": "general.license.link",
    "language": "general.languages",
}
_LARGEST_F16 = float(np.finfo(np.float16).max)
_ATTENTION = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output")
_MLP = ("ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class Packed:
    """A weight matrix as blocks of a GGUF type."""

    blocks: NDArray[np.uint8]
    """[rows, bytes of a row]; may be mapped from a file."""
    kind: GGMLQuantizationType


@dataclass(frozen=True)
class _Tensor:
    """A tensor to write; its values are made when it is their turn."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    """In numbers, not bytes."""
    make: Callable[[], NDArray[Any]]

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return int(np.prod(gguf.quant_shape_to_byte_shape(self.shape, self.kind), dtype=np.int64))


def write_gguf(
    model: Path,
    path: Path,
    packed: Mapping[str, Packed],
    *,
    name: str,
    card: Mapping[str, Any] = {},
    dense: GGMLQuantizationType = GGMLQuantizationType.F16,
    absent: Absent = (),
) -> None:
    """Write a model folder as a GGUF file.

    Args:
        model: folder with config.json, tokenizer and safetensors.
        path: the file; what is there after an error is no whole file.
        packed: weights that are packed already, by their name in transformers, as in
            `model.layers.0.mlp.up_proj.weight`. One whose rows llama.cpp wants in another order is given in that of
            transformers.
        name: of the model, for people.
        card: entries of the original's model card, of which the header tells license and languages.
        dense: type of the other matrices; those whose rows it does not divide are F16. Vectors are always F32.
        absent: modules (block, kind) to leave out, where the model of the folder has an output projection of zeros. The
            attention of the first block stays, zeros and all: llama.cpp takes the size of heads from it.

    Raises:
        UnsupportedArchitectureError: llama.cpp has no code that computes this model; what is in the way is named.
        ModelError: the tokenizer cannot be carried over, or the checkpoint is damaged.
        ValueError: a packed weight is none of the model, or of another shape.
    """
    source = _open(model, packed, dense, absent)
    tensors = list(source.tensors())
    writer = _begin(path, model, source, tensors, name, card)
    for tensor in tensors:
        writer.write_tensor_data(np.ascontiguousarray(tensor.make()))
    writer.close()
    check_tokens(path, model, source.rows)
    log.info("%s: %d tensors, %.1f MB", path.name, len(tensors), path.stat().st_size / 1e6)


def fixed_bytes(
    model: Path,
    searched: Collection[str],
    *,
    name: str,
    card: Mapping[str, Any] = {},
    dense: GGMLQuantizationType = GGMLQuantizationType.F16,
) -> int:
    """Bytes of the file that `write_gguf` makes, beside the data of the weights named ``searched``, which are packed.

    Name, card and type of dense matrices are those that the file will be written with.

    Raises:
        UnsupportedArchitectureError: llama.cpp has no code that computes this model.
        ModelError: the tokenizer cannot be carried over, or the checkpoint is damaged.
    """
    source = _open(model, {}, dense, ())
    places = {key for weight, key in source.names().items() if weight in searched}
    tensors = list(source.tensors())
    # What a tensor is packed in takes the same place in the header; that something is packed is told there, once.
    told = [replace(each, kind=GGMLQuantizationType.Q8_0) if each.name in places else each for each in tensors]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"
        _begin(path, model, source, told, name, card).close()
        header = stored_bytes(path.stat().st_size)
    return header + sum(stored_bytes(tensor.bytes) for tensor in tensors if tensor.name not in places)


def stored_bytes(size: int) -> int:
    """What a tensor of ``size`` bytes takes in a file: the next begins at a multiple of 32."""
    return GGUFWriter.ggml_pad(size, gguf.GGUF_DEFAULT_ALIGNMENT)


def _open(
    model: Path, packed: Mapping[str, Packed], dense: GGMLQuantizationType, absent: Iterable[tuple[int, str]]
) -> "_Source":
    """The tensors of a model folder as a file will hold them."""
    config, absent = load_config(model).get_text_config(), frozenset(absent) - {(0, ATTENTION)}
    shapes = {key: tuple(value.shape) for key, value in skeleton_of(config, torch.float32).state_dict().items()}
    return _Source(Checkpoint(model), config, layout_of(config), shapes, packed, dense, absent)


def _begin(
    path: Path, model: Path, source: "_Source", tensors: Sequence["_Tensor"], name: str, card: Mapping[str, Any]
) -> GGUFWriter:
    """Write everything that comes before the data of the tensors; whoever gets the writer closes it."""
    writer, rows = GGUFWriter(path, architecture_of(source.layout, source.absent)), source.rows
    header = {"general.type": "model", "general.name": name, **_from_card(card)}
    if any(tensor.kind not in DENSE[:3] for tensor in tensors):
        header["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    keys = header_keys(source.config, source.layout, rows, source.absent)
    for key, value in {**header, **keys, **tokenizer_keys(model, rows)}.items():
        _add(writer, key, value)
    unused = np.dtype(np.float32)  # where the kind is given, and the shape in numbers
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, unused, tensor.bytes, tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


@dataclass(frozen=True)
class _Source:
    """Where the tensors of a file come from."""

    checkpoint: Checkpoint
    config: Any
    layout: Layout
    shapes: Mapping[str, tuple[int, ...]]
    """Of every parameter, by its name in transformers."""
    packed: Mapping[str, Packed]
    dense: GGMLQuantizationType
    absent: Absent

    @property
    def rows(self) -> int:
        """Of the input embedding: tokens that there is room for."""
        return self.shapes["model.embed_tokens.weight"][0]

    def tensors(self) -> Iterator[_Tensor]:
        """Every tensor of the file."""
        names = self.names()
        if strange := sorted(set(self.packed) - set(names)):
            raise ValueError(f"{strange[0]}: is packed, and the file has no place for it")
        for tensor, values in rope_tensors(self.config).items():
            yield _Tensor(tensor, _F32, values.shape, lambda values=values: values)  # type: ignore[misc]
        for name, key in names.items():
            if not self._is_absent(key):
                yield self._packed(name, key) if name in self.packed else self._dense(name, key)
        for block, kind in sorted(self.absent):
            if kind == MLP:
                yield from self._stand_in(block)

    def names(self) -> dict[str, str]:
        """Name in the file of each parameter that is stored."""
        wanted = [name for name in self.shapes if not (name == "lm_head.weight" and self.config.tie_word_embeddings)]
        names = stored_names(wanted, self.layout.architecture, self.config.num_hidden_layers)
        lost = set(wanted) - set(names)
        lost |= {
            name
            for name, key in names.items()
            if key.endswith(".bias") and key.split(".")[-2] not in self.layout.biases
        }
        if lost:
            raise UnsupportedArchitectureError(
                f"{self.config.model_type}: cannot be written as GGUF: llama.cpp has no place for {min(lost)}"
            )
        return names

    def _is_absent(self, key: str) -> bool:
        parts = key.split(".")
        if parts[0] != "blk":
            return False
        kind = ATTENTION if parts[2] in _ATTENTION else MLP if parts[2] in _MLP else None
        return (int(parts[1]), kind) in self.absent

    def _stand_in(self, block: int) -> Iterator[_Tensor]:
        """A feed-forward that gives out zeros."""
        hidden = self.config.hidden_size
        for part in _MLP:
            shape = (hidden, STAND_IN) if part == "ffn_down" else (STAND_IN, hidden)
            made = np.zeros(shape, np.float16)
            yield _Tensor(
                f"blk.{block}.{part}.weight",
                GGMLQuantizationType.F16,
                shape,
                lambda made=made: made,  # type: ignore[misc]
            )

    def _packed(self, name: str, key: str) -> _Tensor:
        given, shape = self.packed[name], self.shapes[name]
        wanted = gguf.quant_shape_to_byte_shape(shape, given.kind)
        if given.blocks.dtype != np.uint8 or given.blocks.shape != tuple(wanted):
            raise ValueError(
                f"{name}: is packed as {list(given.blocks.shape)} bytes, and {given.kind.name} needs {list(wanted)}"
            )
        return _Tensor(key, given.kind, shape, lambda: self._ordered(given.blocks, key))

    def _dense(self, name: str, key: str) -> _Tensor:
        shape = self.shapes[name]
        kind = _F32 if len(shape) == 1 else self.dense
        if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = GGMLQuantizationType.F16
        return _Tensor(key, kind, shape, lambda: self._converted(name, key, kind))

    def _converted(self, name: str, key: str, kind: GGMLQuantizationType) -> NDArray[Any]:
        values = self.checkpoint.read([name], dtype=torch.float32)[name].numpy()
        if values.shape != self.shapes[name]:
            raise ModelError(
                f"{self.checkpoint.folder}: {name} is {list(values.shape)}, and config.json asks for "
                f"{list(self.shapes[name])}; they do not belong together"
            )
        if self.layout.norms_plus_one and key.endswith("norm.weight"):
            values = values + 1
        largest = float(np.abs(values).max(initial=0))
        if kind == GGMLQuantizationType.F16 and largest > _LARGEST_F16:
            raise ModelError(f"{name}: holds {largest:g}, which F16 cannot; store it as BF16")
        return gguf.quantize(self._ordered(values, key), kind)

    def _ordered(self, rows: NDArray[Any], key: str) -> NDArray[Any]:
        """Rows in the order of llama.cpp; those that turn together lie beside each other in a Llama."""
        part = key.split(".")[-2]
        if not self.layout.interleaved or part not in ("attn_q", "attn_k"):
            return rows
        halves = rows.reshape(-1, 2, head_size(self.config) // 2, *rows.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def _from_card(card: Mapping[str, Any]) -> dict[str, Any]:
    """Terms of use and languages, as the original's card has them."""
    told = {key: card[name] for name, key in _FROM_CARD.items() if isinstance(card.get(name), str | list)}
    if isinstance(told.get("general.languages"), str):
        told["general.languages"] = [told["general.languages"]]
    return told


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    """Add a key with the type that llama.cpp expects of such a value."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
