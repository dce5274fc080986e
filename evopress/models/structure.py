"""Blocks and linear layers of a model, found from its module tree and from one run, not from class names."""

from collections import Counter

import pandas as pd
from torch import nn
from transformers import PreTrainedModel

from evopress.errors import UnsupportedArchitectureError
from evopress.models.modules import module_kind
from evopress.models.standin import Surroundings
from evopress.models.trace import check_chain, input_groups, surroundings


def unsupported(model: PreTrainedModel, reason: str) -> UnsupportedArchitectureError:
    """The error that names the architecture of ``model`` and why it cannot be handled."""
    return UnsupportedArchitectureError(f"{type(model).__name__}: this architecture is not supported: {reason}")


def linear_layers(block: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers of a block by their name inside it, in order of definition."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and modules of the list of transformer blocks.

    It is the list with as many members as the (text) config has layers that holds most parameters of linear layers.

    Raises:
        UnsupportedArchitectureError: no such list, or its weights are not all in linear layers, or shared.
    """
    if model.config.is_encoder_decoder:
        raise unsupported(model, "it is an encoder and a decoder, not one chain of blocks")
    count = model.config.get_text_config().num_hidden_layers
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    sizes = {name: _linear_parameters(module) for name, module in lists.items()}
    name = max(sizes, key=sizes.__getitem__, default="")
    if not sizes.get(name):
        raise unsupported(model, f"it has no list of {count} blocks with linear layers{_strange_matrices(model)}")
    _check_weights(model, name, lists[name])
    return name, lists[name]


def surroundings_of(model: PreTrainedModel) -> tuple[str, Surroundings]:
    """Name of the list of blocks, and the model around them; weights of blocks may be on the meta device.

    Raises:
        UnsupportedArchitectureError: no blocks are found, or they return more than hidden states.
    """
    name, blocks = find_blocks(model)
    return name, surroundings(model, list(blocks), lambda reason: unsupported(model, reason))


def layer_table(model: PreTrainedModel) -> pd.DataFrame:
    """Table (``artifacts.tables.LAYERS``) of the linear layers, by block and in the order in which they run.

    What surrounds the blocks must have weights, since it is run on a few tokens; blocks may be on the meta device.

    Raises:
        UnsupportedArchitectureError: the model cannot be run block by block.
    """

    def refuse(reason: str) -> UnsupportedArchitectureError:
        return unsupported(model, reason)

    name, around = surroundings_of(model)
    inputs = check_chain(around, refuse)
    hidden_size = model.config.get_text_config().hidden_size
    rows = []
    for index, block in enumerate(around.blocks):
        layers = linear_layers(block)
        groups = input_groups(block, index, inputs, hidden_size, layers, refuse)
        rows += [_row(index, f"{name}.{index}", layer, group, layers[layer]) for layer, group in groups.items()]
    return pd.DataFrame(rows)


def _row(index: int, block: str, layer: str, group: str, module: nn.Linear) -> dict[str, object]:
    return {
        "block": index,
        "layer": layer,
        "name": f"{block}.{layer}",
        "kind": layer.rpartition(".")[2],
        "module": module_kind(layer),
        "input_group": group,
        "rows": module.out_features,
        "columns": module.in_features,
        "parameters": module.weight.numel(),
    }


def _linear_parameters(blocks: nn.ModuleList) -> int:
    """Parameters of linear layers in ``blocks``; zero unless every member has some."""
    counts = [sum(layer.weight.numel() for layer in linear_layers(block).values()) for block in blocks]
    return sum(counts) if all(counts) else 0


def _check_weights(model: PreTrainedModel, name: str, blocks: nn.ModuleList) -> None:
    """Refuse weights that no level could be given to, and those that two blocks share."""
    for index, block in enumerate(blocks):
        matrices = {f"{layer}.weight" for layer in linear_layers(block)}
        for key, parameter in block.named_parameters():
            if parameter.ndim > 1 and key not in matrices:
                shape = "x".join(map(str, parameter.shape))
                raise unsupported(model, f"{name}.{index}.{key} ({shape}) is not the weight of a linear layer")
    owners = Counter(
        id(parameter) for block in blocks for _, parameter in block.named_parameters(remove_duplicate=False)
    )
    if any(count > 1 for count in owners.values()):
        raise unsupported(model, f"the blocks in {name} share weights")


def _strange_matrices(model: PreTrainedModel) -> str:
    """Words on the first matrix in a list of modules that is no linear layer's, to explain why none was found."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            for key, parameter in module.named_parameters():
                if parameter.ndim > 1:
                    return f"; {name}.{key} belongs to a {type(module.get_submodule(key.rpartition('.')[0])).__name__}"
    return ""
