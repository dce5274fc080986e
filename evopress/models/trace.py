"""Small runs that show whether the blocks of a model form a chain, and which layers share an input.

What surrounds the blocks runs for real on a few tokens, since its code looks at values (of masks, for one); the blocks
run as copies on the meta device, which costs neither their weights nor any arithmetic.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from evopress.models.standin import BlockInputs, Surroundings, split_hidden

_TOKENS = 4
_BATCH = 2

Refuse = Callable[[str], Exception]
"""Makes the exception that names the architecture, from a reason."""


def surroundings(model: PreTrainedModel, blocks: Sequence[nn.Module], refuse: Refuse) -> Surroundings:
    """The model without what its blocks do, after seeing what the first block returns.

    Raises:
        the exception made by ``refuse``: blocks return more than hidden states, or cannot be run apart.
    """
    with _explained(refuse), torch.no_grad():
        _, inputs = Surroundings(model, blocks, form=0).inputs(_ids(model), count=1)
        output = run_on_meta(blocks[0], inputs, 0, model.config.get_text_config().hidden_size)
    if isinstance(output, Tensor):
        return Surroundings(model, blocks, form=0)
    if not isinstance(output, tuple) or any(part is not None for part in output[1:]):
        raise refuse("its blocks hand on more than hidden states")
    return Surroundings(model, blocks, form=len(output))


def check_chain(around: Surroundings, refuse: Refuse) -> BlockInputs:
    """Check that each block runs once, in order, on what the block before it returned; returns the blocks' inputs.

    Raises:
        the exception made by ``refuse``: they do not, or logits cannot be made from final hidden states alone.
    """
    entered: list[tuple[int, Tensor]] = []
    returned: list[Tensor] = []

    def stand_in(index: int, *args: Any, **kwargs: Any) -> Tensor:
        hidden = split_hidden(args, kwargs)[0]
        entered.append((index, hidden))
        returned.append(hidden.view_as(hidden))  # a tensor of its own, without memory of its own
        return returned[-1]

    with _explained(refuse), torch.no_grad():
        logits = around.run(_ids(around.model), stand_in)
        order = [index for index, _ in entered]
        if order != list(range(len(around.blocks))):
            raise refuse(f"its {len(around.blocks)} blocks do not run once each in order, but as {order}")
        for (index, hidden), previous in zip(entered[1:], returned, strict=False):
            if hidden is not previous:
                raise refuse(f"block {index} does not run on what block {index - 1} returns")
        if around.logits(torch.cat([returned[-1]] * _BATCH)).shape != (_BATCH, *logits.shape[1:]):
            raise refuse("its logits cannot be made from final hidden states alone")
        return few_inputs(around)


def input_groups(
    block: nn.Module, index: int, inputs: BlockInputs, hidden_size: int, layers: Mapping[str, nn.Linear], refuse: Refuse
) -> dict[str, str]:
    """Linear layer -> the first layer of the block that gets the very same tensor, in order of execution.

    Raises:
        the exception made by ``refuse``: inputs made for one sequence do not serve several, or a linear layer does
            not run exactly once on every token.
    """
    calls: list[tuple[str, Tensor]] = []

    def watch(twin: nn.Module) -> None:
        for name, module in twin.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda _, args, name=name: calls.append((name, args[0])))

    with _explained(refuse), torch.no_grad():
        output = run_on_meta(block, inputs, index, hidden_size, watch)
    hidden = output[0] if isinstance(output, tuple) else output
    if hidden.shape != (_BATCH, _TOKENS, hidden_size):
        raise refuse(f"block {index} turns hidden states into {list(hidden.shape)}")
    first: dict[int, str] = {}
    groups: dict[str, str] = {}
    for name, tensor in calls:  # the list keeps the tensors alive, so no two of them share an id
        if name in groups or tensor.numel() != _BATCH * _TOKENS * layers[name].in_features:
            raise refuse(f"{name} of block {index} does not run once on every token")
        groups[name] = first.setdefault(id(tensor), name)
    idle = sorted(set(layers) - set(groups))
    if idle:
        raise refuse(f"{idle[0]} of block {index} does not run on every token")
    return groups


def few_inputs(around: Surroundings) -> BlockInputs:
    """What the blocks get beside the hidden states, for a few tokens, as `run_on_meta` needs it."""
    return around.inputs(_ids(around.model))[1]


def _ids(model: PreTrainedModel) -> Tensor:
    """A few tokens, on the device of the embedding (blocks may be on the meta device)."""
    device = next(model.get_input_embeddings().parameters()).device
    return torch.zeros((1, _TOKENS), dtype=torch.long, device=device)


def run_on_meta(
    block: nn.Module,
    inputs: BlockInputs,
    index: int,
    hidden_size: int,
    prepare: Callable[[nn.Module], None] = lambda twin: None,
) -> Any:
    """Output of a copy of ``block`` on several sequences; ``prepare`` may put hooks on the copy."""
    # Weights are not copied: the twin shares their names and shapes alone.
    twin = copy.deepcopy(block, {id(tensor): _on_meta(tensor) for tensor in block.parameters()}).to("meta")
    prepare(twin)
    dtype = next(parameter.dtype for parameter in twin.parameters() if parameter.is_floating_point())
    hidden = torch.empty((_BATCH, _TOKENS, hidden_size), dtype=dtype, device="meta")
    args, kwargs = tree_map(
        lambda value: value.to("meta") if isinstance(value, Tensor) else value, inputs.call(index, hidden)
    )
    return twin(*args, **kwargs)


def _on_meta(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


@contextmanager
def _explained(refuse: Refuse) -> Iterator[None]:
    """Turn what foreign model code raises when it is run apart into the error that names the architecture."""
    try:
        yield
    except (RuntimeError, NotImplementedError, ValueError, TypeError, LookupError, AttributeError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise refuse(f"its blocks cannot be run apart ({type(error).__name__}: {first_line})") from error
