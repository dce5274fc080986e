"""Whether a config can be built: tried on the meta device, where nothing is allocated, and stopped when it grows wild.

A config is a few numbers that anyone may write. Some are sizes, which cost nothing on the meta device; some are counts
of modules, and a billion of those fill all memory. Which key means what differs by architecture, so parts are counted
as they come.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as registration

from evopress.config.model import MOST_BLOCKS
from evopress.models.skeleton import architecture, skeleton_of
from evopress.util.errors import UnsupportedArchitectureError

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
