"""A model without weights, and filling it from a checkpoint."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn.modules import module as registration
from transformers import AutoConfig, AutoModelForCausalLM

from evopress.config.model import MOST_BLOCKS
from evopress.models.checkpoint import Checkpoint, read_json
from evopress.util.errors import ModelError, UnsupportedArchitectureError, brief

# Settings of a config that say how a model is computed, or what a call returns, and nothing of what the model is.

HOW_TO_COMPUTE = frozenset(
    {
        # which kernels
        *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
        *("_attn_implementation_autoset", "experts_implementation", "_experts_implementation"),
        *("_experts_implementation_internal", "_flash_attn_2_enabled", "use_flash_attn", "use_flash_attention"),
        *("use_flash_attention_2", "flash_attn", "flash_rotary", "use_flash_rotary", "fused_dense", "use_sdpa"),
        *("use_kernels", "use_mamba_kernels", "compile_config", "cache_implementation"),
        # where
        *("device_map", "tp_plan", "base_model_tp_plan", "base_model_pp_plan", "base_model_fsdp_plan"),
        *("distributed_config", "low_cpu_mem_usage"),
        # in training
        *("gradient_checkpointing", "use_gradient_checkpointing"),
        # what a call returns
        *("torchscript", "return_dict", "use_return_dict", "output_attentions", "output_hidden_states"),
    }
)


def computed_as_here(config: Any) -> Any:
    """A transformers config, changed so that this machine chooses how to compute it; its text model's likewise."""
    for section in (config, config.get_text_config()):
        section.output_attentions = section.output_hidden_states = False
        section.return_dict = True
    config._attn_implementation = config._experts_implementation = None  # these reach all sections
    return config


# Whether a config can be built: tried on the meta device, where nothing is allocated, and stopped when it grows wild.

MOST_PARTS = 400_000
"""Modules, parameters and buffers; the largest models, with modules for each expert, have half as many."""
MOST_BUFFER_BYTES = 2 << 30
"""Buffers (tables of positions, masks) are made for real when a model is loaded."""


def built_on_meta(config: Any, parameters: int | None = None, *, trust_remote_code: bool = False) -> Any:
    """The model of a transformers config, all of it on the meta device, if it has a size that can be.

    Args:
        config: of the model.
        parameters: numbers that its file holds, if they are known: the model may not have twice as many.
        trust_remote_code: run code that comes with the model.

    Raises:
        UnsupportedArchitectureError: it has not, or transformers cannot build it.
    """
    name = architecture(config.architectures, config.model_type)
    blocks = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(blocks, int) and blocks > MOST_BLOCKS:
        raise UnsupportedArchitectureError(f"{name}: its config asks for {blocks} blocks; do not trust this model")
    with torch.device("meta"), _counted(name):
        model = skeleton_of(config, torch.float32, trust_remote_code=trust_remote_code)
    asked = sum(parameter.numel() for parameter in model.parameters())
    if parameters is not None and asked > 2 * parameters:
        raise UnsupportedArchitectureError(
            f"{name}: its config asks for {asked} parameters, and its file holds {parameters}; they do not belong "
            "together"
        )
    return model


@contextmanager
def _counted(name: str) -> Iterator[None]:
    """Count what modules register, and stop where it is too much."""
    parts = size = 0

    def count(module: Any, key: str, part: Any) -> None:
        """Count a module, parameter or buffer as it is registered."""
        nonlocal parts, size
        parts += 1
        if isinstance(part, Tensor) and not isinstance(part, torch.nn.Parameter):
            size += part.nbytes
        if parts > MOST_PARTS or size > MOST_BUFFER_BYTES:
            what = f"more than {MOST_PARTS} parts" if parts > MOST_PARTS else f"buffers of {size} bytes"
            raise _TooMuchError(f"{name}: its config asks for {what}; do not trust this model")

    hooks = [
        registration.register_module_module_registration_hook(count),
        registration.register_module_parameter_registration_hook(count),
        registration.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _TooMuchError(UnsupportedArchitectureError):
    """Not to be told as an error of the architecture's code."""


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
