"""Blocks and linear layers of a model, found from its module tree."""

from torch import nn
from transformers import PreTrainedModel

from evopress.errors import UnsupportedArchitectureError


def unsupported(model: PreTrainedModel, reason: str) -> UnsupportedArchitectureError:
    """The error that names the architecture of ``model`` and why it cannot be handled."""
    return UnsupportedArchitectureError(f"{type(model).__name__}: {reason}; this architecture is not supported")


def linear_layers(block: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers of a block by their name inside it, in order of definition."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and modules of the list of transformer blocks: the one that holds most parameters of linear layers.

    Raises:
        UnsupportedArchitectureError: no such list, or its length is not the config's number of layers.
    """
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        raise unsupported(model, "it is an encoder and a decoder, not one chain of blocks")
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    weight = {name: _linear_parameters(module) for name, module in lists.items()}
    name = max(weight, key=weight.__getitem__, default="")
    if not weight.get(name):
        raise unsupported(model, "it has no list of blocks with linear layers")
    expected = config.num_hidden_layers
    if len(lists[name]) != expected:
        raise unsupported(model, f"its largest list of blocks, {name}, has {len(lists[name])} members, not {expected}")
    return name, lists[name]


def _linear_parameters(blocks: nn.ModuleList) -> int:
    """Parameters of linear layers in ``blocks``; zero unless every member has some."""
    counts = [sum(layer.weight.numel() for layer in linear_layers(block).values()) for block in blocks]
    return sum(counts) if all(counts) else 0
