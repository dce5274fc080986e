"""Stand-ins for blocks: run everything of a model but its blocks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HIDDEN = "hidden_states"
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

    def call(self, index: int, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments with which block ``index`` is called on ``hidden``."""
        if self.by_name:
            return self.args[index], {**self.kwargs[index], HIDDEN: hidden}
        return (hidden, *self.args[index]), dict(self.kwargs[index])

    def same(self, other: "BlockInputs") -> bool:
        """Whether both hold equal values."""
        return _equal((self.args, self.kwargs), (other.args, other.kwargs))


class _Done(Exception):  # noqa: N818 (not an error)
    """The last stand-in was reached; nothing after it is wanted."""


@contextmanager
def stand_in(blocks: Sequence[nn.Module], make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of block i by ``make(i)``, and put everything back whatever happens."""
    kept = [block.__dict__.get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.forward = make(index)
        yield
    finally:
        for block, forward in zip(blocks, kept, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.__dict__["forward"] = forward


def split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Hidden states of a call of a block, and its other arguments."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs[HIDDEN], (), {name: value for name, value in kwargs.items() if name != HIDDEN}


def capture_inputs(model: nn.Module, blocks: Sequence[nn.Module], input_ids: Tensor) -> tuple[Tensor, BlockInputs]:
    """Hidden states that the first of ``blocks`` gets, and the other inputs of each; the run ends at the last one.

    ``blocks`` are the first ones of the model, which runs on ``input_ids`` [S, L] without a cache.
    """
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def make(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            seen.append((args, kwargs))
            if len(seen) == len(blocks):
                raise _Done
            return split_hidden(args, kwargs)[0]

        return forward

    with stand_in(blocks, make):
        with suppress(_Done):
            model(input_ids=input_ids, use_cache=False)
    parts = [split_hidden(args, kwargs) for args, kwargs in seen]
    rest = tuple(args for _, args, _ in parts), tuple(kwargs for _, _, kwargs in parts)
    return parts[0][0], BlockInputs(input_ids.shape[1], *rest, by_name=not seen[0][0])


def finish(model: nn.Module, blocks: Sequence[nn.Module], hidden: Tensor) -> Tensor:
    """Logits [N, L, V] that the model makes of final hidden states [N, L, H].

    One dummy token is enough to drive the model to its last block, which then hands on ``hidden``.
    """
    last = len(blocks) - 1

    def make(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            return hidden if index == last else split_hidden(args, kwargs)[0]

        return forward

    dummy = torch.zeros((1, 1), dtype=torch.long, device=hidden.device)
    with stand_in(blocks, make):
        logits = model(input_ids=dummy, use_cache=False).logits
    return logits.reshape(*hidden.shape[:-1], -1)


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(map(_equal, first, second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_equal(value, second[key]) for key, value in first.items())
    return type(first) is type(second)
