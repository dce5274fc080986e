"""A model run without its blocks: stand-ins take their place while the model's own code runs around them.

Small runs of that kind show whether the blocks form a chain, and which layers share an input. What surrounds the blocks
runs for real on a few tokens, since its code looks at values (of masks, for one); the blocks run as copies on the meta
device, which costs neither their weights nor any arithmetic.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

_HIDDEN = "hidden_states"
"""Name of the hidden states where a model passes them to its blocks by name."""
_TOKENS = 4
_BATCH = 2
_PLAIN = (Tensor, NoneType, bool, int, float, str, torch.dtype, torch.device)
"""What a block may get beside its hidden states. Anything else could be a state that blocks share and change."""


@dataclass(frozen=True)
class BlockInputs:
    """What each block gets beside the hidden states, made for one sequence of ``length`` tokens."""

    length: int
    args: tuple[tuple[Any, ...], ...]
    """Positional arguments after the hidden states, per block."""
    kwargs: tuple[dict[str, Any], ...]
    by_name: bool
    """Whether the hidden states are passed by name."""
    alone: bool = False
    """Whether they serve one sequence at a time only (ALiBi biases of one batch, in BLOOM)."""

    def call(self, index: int, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments with which block ``index`` is called on ``hidden``."""
        if self.by_name:
            return self.args[index], {**self.kwargs[index], _HIDDEN: hidden}
        return (hidden, *self.args[index]), dict(self.kwargs[index])

    def same(self, other: "BlockInputs") -> bool:
        """Whether both hold equal values."""
        return _equal((self.args, self.kwargs), (other.args, other.kwargs))


class _Stop(Exception):  # noqa: N818 (not an error)
    """The last block of interest was reached; nothing after it is wanted."""


@dataclass(frozen=True)
class Surroundings:
    """A causal language model without what its blocks do."""

    model: PreTrainedModel
    blocks: Sequence[nn.Module]
    rest: tuple[Any, ...] | None = None
    """What stands for all that a block returns after its hidden states; None where it returns them bare."""
    alone: bool = False
    """Whether blocks take one sequence at a time only."""

    def inputs(self, input_ids: Tensor, count: int | None = None) -> tuple[Tensor, BlockInputs]:
        """Hidden states before the first block for ``input_ids`` [S, L], and the other inputs of ``count`` blocks."""
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def stand_in(_: int, *args: Any, **kwargs: Any) -> Tensor:
            """Note what a block is called with, and stop at the last block of interest."""
            seen.append((args, kwargs))
            if len(seen) == (count or len(self.blocks)):
                raise _Stop
            return split_hidden(args, kwargs)[0]

        with suppress(_Stop):
            self.run(input_ids, stand_in)
        parts = [split_hidden(args, kwargs) for args, kwargs in seen]
        args = tuple(args for _, args, _ in parts)
        kwargs = tuple(kwargs for _, _, kwargs in parts)
        return parts[0][0], BlockInputs(input_ids.shape[1], args, kwargs, not seen[0][0], self.alone)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [N, L, V] of final hidden states [N, L, H].

        One dummy token is enough to drive the model to its last block, which then hands on ``hidden``.
        """

        def stand_in(index: int, *args: Any, **kwargs: Any) -> Tensor:
            """Hand on ``hidden`` from the last block."""
            return hidden if index == len(self.blocks) - 1 else split_hidden(args, kwargs)[0]

        dummy = torch.zeros((1, 1), dtype=torch.long, device=hidden.device)
        return self.run(dummy, stand_in).reshape(*hidden.shape[:-1], -1)

    def run(self, input_ids: Tensor, stand_in: Callable[..., Tensor]) -> Tensor:
        """Logits of the model where block i is ``stand_in(i, *args, **kwargs)``, which returns hidden states."""
        with _forwards(self.blocks, stand_in, self.rest):
            return self.model(input_ids=input_ids, use_cache=False).logits


def split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Hidden states of a call of a block, and its other arguments."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs[_HIDDEN], (), {name: value for name, value in kwargs.items() if name != _HIDDEN}


@contextmanager
def _forwards(
    blocks: Sequence[nn.Module], stand_in: Callable[..., Tensor], rest: tuple[Any, ...] | None
) -> Iterator[None]:
    """Replace the forward of every block, and put everything back whatever happens."""

    def forward(index: int) -> Callable[..., Any]:
        """The forward of a block, by its index."""

        def call(*args: Any, **kwargs: Any) -> Any:
            """Return what the stand-in makes, in the form in which the block returns it."""
            hidden = stand_in(index, *args, **kwargs)
            return hidden if rest is None else (hidden, *rest)

        return call

    kept = [block.__dict__.get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.forward = forward(index)
        yield
    finally:
        for block, original in zip(blocks, kept, strict=True):
            block.__dict__.pop("forward", None)
            if original is not None:
                block.__dict__["forward"] = original


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(map(_equal, first, second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_equal(value, second[key]) for key, value in first.items())
    return type(first) is type(second)


class _Unused:
    """Stands for attention weights and the like, which a model may collect; it fails where one computes with it."""


Refuse = Callable[[str], Exception]
"""Makes the exception that names the architecture, from a reason."""


def surroundings(model: PreTrainedModel, blocks: Sequence[nn.Module], refuse: Refuse) -> Surroundings:
    """The model without what its blocks do, after seeing what the first block takes and returns.

    Raises:
        the exception made by ``refuse``: blocks return no hidden states, or cannot be run apart.
    """
    hidden_size = model.config.get_text_config().hidden_size
    with _explained(refuse), torch.no_grad():
        _, inputs = Surroundings(model, blocks).inputs(_ids(model), count=1)
        try:
            output = run_on_meta(blocks[0], inputs, 0, hidden_size)
        except (RuntimeError, ValueError):  # a bias or mask made for one sequence does not serve two
            inputs = replace(inputs, alone=True)
            output = run_on_meta(blocks[0], inputs, 0, hidden_size)
    if isinstance(output, Tensor):
        return Surroundings(model, blocks, alone=inputs.alone)
    if not isinstance(output, tuple):
        raise refuse(f"its blocks return a {type(output).__name__}, not hidden states")
    rest = tuple(None if part is None else _Unused() for part in output[1:])
    return Surroundings(model, blocks, rest, inputs.alone)


def check_chain(around: Surroundings, refuse: Refuse) -> BlockInputs:
    """Check that each block runs once, in order, on what the block before it returned; returns the blocks' inputs.

    Raises:
        the exception made by ``refuse``: they do not, they share a state, or logits cannot be made from final hidden
            states alone.
    """
    entered: list[tuple[int, Tensor]] = []
    returned: list[Tensor] = []

    def stand_in(index: int, *args: Any, **kwargs: Any) -> Tensor:
        """Note the block and its hidden states, and return them as a tensor of its own."""
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
        inputs = few_inputs(around)
    _require_stateless(inputs, refuse)
    return inputs


def input_groups(
    block: nn.Module, index: int, inputs: BlockInputs, hidden_size: int, layers: Mapping[str, nn.Linear], refuse: Refuse
) -> dict[str, str]:
    """Linear layer -> the first layer of the block that gets the very same tensor, in order of execution.

    Raises:
        the exception made by ``refuse``: the block writes a state for others, or a linear layer does not run exactly
            once on every token.
    """
    calls: list[tuple[str, Tensor]] = []

    def watch(twin: nn.Module) -> None:
        """Note the input of each linear layer."""
        for name, module in twin.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda _, args, name=name: calls.append((name, args[0])))

    with _explained(refuse), torch.no_grad():
        output = run_on_meta(block, inputs, index, hidden_size, watch)
    _require_stateless(inputs, refuse)
    hidden = output[0] if isinstance(output, tuple) else output
    sequences = _sequences(inputs)
    if hidden.shape != (sequences, _TOKENS, hidden_size):
        raise refuse(f"block {index} turns hidden states into {list(hidden.shape)}")
    first: dict[int, str] = {}
    groups: dict[str, str] = {}
    for name, tensor in calls:  # the list keeps the tensors alive, so no two of them share an id
        if name in groups or tensor.numel() != sequences * _TOKENS * layers[name].in_features:
            raise refuse(f"{name} of block {index} does not run once on every token")
        groups[name] = first.setdefault(id(tensor), name)
    idle = sorted(set(layers) - set(groups))
    if idle:
        raise refuse(f"{idle[0]} of block {index} does not run on every token")
    return groups


def _require_stateless(inputs: BlockInputs, refuse: Refuse) -> None:
    """Refuse inputs by which blocks could reach one another: candidates are run beside one another, not in turn."""
    for value in tree_leaves((inputs.args, inputs.kwargs)):
        empty = isinstance(value, Mapping) and not value  # Gemma 4 hands one to all blocks, and fills it in few sizes
        if not empty and not isinstance(value, _PLAIN):
            raise refuse(f"its blocks hand on more than hidden states ({type(value).__name__.lstrip('_')})")


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
    """Output of a copy of ``block``, on several sequences if it takes them; ``prepare`` may put hooks on the copy."""
    # Weights are not copied: the twin shares their names and shapes alone.
    twin = copy.deepcopy(block, {id(tensor): _on_meta(tensor) for tensor in block.parameters()}).to("meta")
    prepare(twin)
    dtype = next(parameter.dtype for parameter in twin.parameters() if parameter.is_floating_point())
    hidden = torch.empty((_sequences(inputs), _TOKENS, hidden_size), dtype=dtype, device="meta")
    args, kwargs = tree_map(
        lambda value: value.to("meta") if isinstance(value, Tensor) else value, inputs.call(index, hidden)
    )
    return twin(*args, **kwargs)


def _sequences(inputs: BlockInputs) -> int:
    return 1 if inputs.alone else _BATCH


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
