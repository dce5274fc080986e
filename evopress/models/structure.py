"""Blocks and linear layers of a model, found from its module tree and from one run, not from class names."""

from collections import Counter
from typing import Any

import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedModel

from evopress.models.modules import EMBEDDING, HEAD, module_kind
from evopress.models.trace import Surroundings, check_chain, input_groups, surroundings
from evopress.util.errors import UnsupportedArchitectureError

_MOST_OTHERS = 0.1
"""Share of the blocks' weights that may lie outside linear layers: what is left to compress decides a model's size."""


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
        UnsupportedArchitectureError: no such list, or many of its weights are in no linear layer, or shared.
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


def outer_table(model: PreTrainedModel) -> pd.DataFrame:
    """Table (``artifacts.tables.LAYERS``) of the input embedding and the head, whose blocks are -1 and one too many.

    Tied ones are one row, the embedding's, whose input group is the head: its columns are what the head multiplies with
    final hidden states. An embedding of its own has no inputs, and is its own group. The model may be on the meta
    device.
    """
    blocks = find_blocks(model)[1]
    names = {id(module): name for name, module in model.named_modules()}
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    rows = [_outer_row(-1, EMBEDDING, names[id(embedding)], HEAD if tied else EMBEDDING, embedding.weight)]
    if isinstance(head, nn.Linear) and not tied:
        rows.append(_outer_row(len(blocks), HEAD, names[id(head)], HEAD, head.weight))
    return pd.DataFrame(rows)


def _outer_row(block: int, layer: str, name: str, group: str, weight: torch.Tensor) -> dict[str, object]:
    return {
        "block": block,
        "layer": layer,
        "name": name,
        "kind": layer,
        "module": layer,
        "input_group": group,
        "rows": weight.shape[0],
        "columns": weight.shape[1],
        "parameters": weight.numel(),
    }


def layer_table(model: PreTrainedModel) -> pd.DataFrame:
    """Table (``artifacts.tables.LAYERS``) of the linear layers, by block and in the order in which they run.

    What surrounds the blocks must have weights, since it is run on a few tokens; blocks may be on the meta device.

    Raises:
        UnsupportedArchitectureError: the model cannot be run block by block.
    """

    def refuse(reason: str) -> UnsupportedArchitectureError:
        """The error that names this architecture."""
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
    """Refuse blocks with many weights that no level could be given to, and those that share some.

    Small ones (norms of heads, short convolutions, decay rates) stay as they are, like the norms.
    """
    others = {
        f"{name}.{index}.{key}": parameter
        for index, block in enumerate(blocks)
        for key, parameter in _other_matrices(block).items()
    }
    share = sum(map(torch.numel, others.values())) / sum(map(torch.numel, blocks.parameters()))
    if share > _MOST_OTHERS:
        key = max(others, key=lambda key: others[key].numel())
        shape = "x".join(map(str, others[key].shape))
        experts = "; experts are not compressed yet, take a dense model" if "expert" in key else ""
        raise unsupported(
            model, f"{share:.0%} of its blocks' weights lie in no linear layer, as does {key} ({shape}){experts}"
        )
    owners = Counter(
        id(parameter) for block in blocks for _, parameter in block.named_parameters(remove_duplicate=False)
    )
    if any(count > 1 for count in owners.values()):
        raise unsupported(model, f"the blocks in {name} share weights")


def _other_matrices(block: nn.Module) -> dict[str, nn.Parameter]:
    """Matrices of a block that are no linear layer's, and so never compressed."""
    linear = {f"{layer}.weight" for layer in linear_layers(block)}
    return {key: weight for key, weight in block.named_parameters() if weight.ndim > 1 and key not in linear}


def _strange_matrices(model: PreTrainedModel) -> str:
    """Words on the first matrix in a list of modules that is no linear layer's, to explain why none was found."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            for key, parameter in module.named_parameters():
                if parameter.ndim > 1:
                    return f"; {name}.{key} belongs to a {type(module.get_submodule(key.rpartition('.')[0])).__name__}"
    return ""
