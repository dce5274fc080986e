"""Everything of a model but its blocks: stand-ins take their place while the model's own code runs around them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_HIDDEN = "hidden_states"
"""Name of the hidden states where a model passes them to its blocks by name."""


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
        def call(*args: Any, **kwargs: Any) -> Any:
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
