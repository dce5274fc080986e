"""A model without weights, and filling it from a checkpoint."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from evopress.models.checkpoint import Checkpoint, read_json
from evopress.models.computing import computed_as_here
from evopress.util.errors import ModelError, UnsupportedArchitectureError, brief


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The transformers config of a model folder.

    Raises:
        ModelError: config.json is missing or damaged.
        UnsupportedArchitectureError: transformers does not know the architecture.
    """
    raw = read_json(folder / "config.json")
    if raw.get("quantization_config"):
        raise UnsupportedArchitectureError(f"{folder}: the model is already quantized; give the original checkpoint")
    try:
        return computed_as_here(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code))
    except Exception as error:  # foreign parsers meet foreign data
        name = architecture(raw.get("architectures"), raw.get("model_type"))
        reason = brief(error)
        if "custom code" in reason:
            reason = "it needs code that comes with it; read that code, then set model.trust_remote_code to true"
        raise UnsupportedArchitectureError(f"{name}: {folder}/config.json cannot be used: {reason}") from error


def stored_dtype(config: Any, checkpoint: Checkpoint) -> torch.dtype:
    """Type of a model's weights, as `from_pretrained` would have them: the config's, else the checkpoint's."""
    return config.dtype or config.get_text_config().dtype or checkpoint.floating_dtype()


def skeleton_of(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Any:
    """The model of a transformers config, in evaluation mode, with parameters on the meta device and real buffers.

    Raises:
        UnsupportedArchitectureError: transformers has no causal language model for it.
    """
    name = architecture(config.architectures, config.model_type)
    if config.is_encoder_decoder:
        raise UnsupportedArchitectureError(f"{name}: an encoder and a decoder, not one chain of blocks: not supported")
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except UnsupportedArchitectureError:
        raise
    except Exception as error:  # foreign code meets foreign data
        raise UnsupportedArchitectureError(f"{name}: is no causal language model: {brief(error)}") from error
    return model.eval().requires_grad_(False)


def fill_outside(model: Any, blocks: str, checkpoint: Checkpoint, device: torch.device) -> None:
    """Load everything outside the blocks (whose list is named ``blocks``) and tie weights as `from_pretrained` does.

    Of the blocks, only the names of the tensors are looked up. Buffers, those of blocks included, move to the device.

    Raises:
        ModelError: a tensor is missing, or of another shape.
        UnsupportedArchitectureError: a tensor is missing, and others are stored that the model does not know.
    """
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    outside = {name for name in model.state_dict() if not name.startswith(f"{blocks}.")}
    inside = set(model.state_dict()) - outside
    missing, lost = ({name for name in part if checkpoint.stored_name(name) is None} for part in (outside, inside))
    assign(model, "", checkpoint, device, model.dtype, skip=inside | missing)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    if missing | lost:
        raise _missing(model, min(missing | lost), checkpoint)
    model.requires_grad_(False)


def _missing(model: Any, name: str, checkpoint: Checkpoint) -> ModelError:
    """What to say where parameter ``name`` is not stored: transformers translates some names when it loads."""
    known = {checkpoint.stored_name(parameter) for parameter in model.state_dict()}
    if unknown := [stored for stored in checkpoint.names() if stored not in known]:
        return UnsupportedArchitectureError(
            f"{type(model).__name__}: {checkpoint.folder} has no tensor {name!r}, but {unknown[0]!r}, which the model "
            "does not know: checkpoints with names of their own are not supported"
        )
    return ModelError(f"{checkpoint.folder}: has no tensor {name!r}; the checkpoint is incomplete")


def assign(
    module: nn.Module,
    prefix: str,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    *,
    skip: Collection[str] = (),
) -> None:
    """Load parameters and buffers of ``module``, called ``prefix`` in the model, except those named in ``skip``.

    Raises:
        ModelError: a tensor is missing, or of another shape.
    """
    expected = {name: tensor for name, tensor in module.state_dict().items() if name not in skip}
    full = {name: f"{prefix}.{name}" if prefix else name for name in expected}
    tensors = checkpoint.read(full.values(), device=device, dtype=dtype)
    for name, tensor in expected.items():
        stored = tensors[full[name]]
        if stored.shape != tensor.shape:
            raise ModelError(
                f"{checkpoint.folder}: {full[name]} is {list(stored.shape)}, but config.json asks for "
                f"{list(tensor.shape)}; config and weights do not belong together"
            )
        owner, _, leaf = name.rpartition(".")
        target = module.get_submodule(owner)
        if leaf in target._buffers:
            target._buffers[leaf] = stored
        else:
            target._parameters[leaf] = nn.Parameter(stored, requires_grad=False)


def architecture(named: Any, kind: Any) -> str:
    """Name of a model for messages, from what its config says under `architectures` and `model_type`."""
    return str(named[0] if isinstance(named, list) and named else kind or "unknown architecture")
