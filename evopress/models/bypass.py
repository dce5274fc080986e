"""Running a block without one of its modules: what is left out returns zeros, and none of its arithmetic is done.

The rest of the block runs as it is written, so the residual stream passes by what is missing, on architectures with
norms before or after their modules, with parallel or with sequential residuals.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evopress.models.modules import Module
from evopress.models.trace import BlockInputs, Refuse, run_on_meta

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Absence:
    """How to leave a module out of a block: what runs in place of some of the block's children."""

    forwards: Mapping[str, Forward]
    """By the child's name inside the block."""


def find_absence(
    block: nn.Module, module: Module, inputs: BlockInputs, index: int, hidden_size: int, refuse: Refuse
) -> Absence:
    """Find out, from a run of a copy of the block on the meta device, what the module's absence looks like.

    Args:
        block: weights may be on any device.
        module: of this block.
        inputs: made for a few tokens (`trace.few_inputs`).
        index: of the block.
        hidden_size: numbers per token between blocks.
        refuse: makes the exception that names the architecture.

    Raises:
        the exception made by ``refuse``: the module returns something else than hidden states, or a norm that follows
            it would turn zeros into something else.
    """
    forwards: dict[str, Forward] = {name: _zero_linear(block, name) for name in module.loose}
    for name in module.containers:
        form = _observe(block, name, inputs, index, hidden_size)
        if form is None:
            raise refuse(
                f"{name} of block {index} cannot be dropped: it does not return hidden states for hidden states"
            )
        forwards[name] = form
    absence = Absence(forwards)
    _require_nothing_added(block, absence, inputs, index, hidden_size, refuse)
    return absence


@contextmanager
def left_out(block: nn.Module, absences: Sequence[Absence]) -> Iterator[None]:
    """Run ``block`` without some of its modules inside this context."""
    children = [(block.get_submodule(name), run) for absence in absences for name, run in absence.forwards.items()]
    try:
        for child, run in children:
            child.forward = run
        yield
    finally:
        for child, _ in children:
            child.__dict__.pop("forward", None)


def _zero_linear(block: nn.Module, name: str) -> Forward:
    """Output of zeros of a linear layer; a view of one number, so nothing is written."""
    features = block.get_submodule(name).out_features
    return lambda tokens: tokens.new_zeros(()).expand(*tokens.shape[:-1], features)


def _observe(block: nn.Module, name: str, inputs: BlockInputs, index: int, hidden_size: int) -> Forward | None:
    """Forward that returns zeros in the form in which the child ``name`` returns hidden states; None if it does not."""
    seen: list[tuple[Any, Any, int]] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Note what the child gets, what it returns, and how many inputs have the shape of hidden states."""
        hidden = _hidden_of(args, kwargs)
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        alike = [value for value in given if isinstance(hidden, Tensor) and value.shape == hidden.shape]
        seen.append((hidden, output, len(alike)))

    run_on_meta(block, inputs, index, hidden_size, lambda twin: _watch(twin, name, hook))
    if len(seen) != 1:
        return None
    hidden, output, streams = seen[0]
    first = output[0] if isinstance(output, tuple) and output else output
    if streams != 1:  # the residual stream is added inside, as in BLOOM: zeros would lose it
        return None
    if hidden is None or not isinstance(first, Tensor) or first.shape != hidden.shape:
        return None
    others = len(output) - 1 if isinstance(output, tuple) else None

    def forward(*args: Any, **kwargs: Any) -> Any:
        """Zeros in place of the hidden states, nothing in place of the rest."""
        zeros = torch.zeros_like(_hidden_of(args, kwargs))
        return zeros if others is None else (zeros, *[None] * others)

    return forward


def _watch(twin: nn.Module, name: str, hook: Callable[..., None]) -> None:
    twin.get_submodule(name).register_forward_hook(hook, with_kwargs=True)


def _hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Hidden states among the arguments of a module: the first, or the one of that name."""
    if args:
        return args[0]
    return kwargs.get("hidden_states", next((value for value in kwargs.values() if isinstance(value, Tensor)), None))


def _require_nothing_added(
    block: nn.Module, absence: Absence, inputs: BlockInputs, index: int, hidden_size: int, refuse: Refuse
) -> None:
    """Refuse a block in which something with a bias gets what the absent module returns."""
    zeros: list[Tensor] = []
    biased: list[str] = []

    def keep(run: Forward) -> Forward:
        """Run as before, and remember the zeros that come out."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            """The same output."""
            output = run(*args, **kwargs)
            zeros.append(output[0] if isinstance(output, tuple) else output)
            return output

        return forward

    def look(name: str, args: tuple[Any, ...]) -> None:
        """Note a module with a bias that gets such zeros."""
        if args and any(args[0] is tensor for tensor in zeros):
            biased.append(name)

    def prepare(twin: nn.Module) -> None:
        """Leave the module out of the copy, and watch what has a bias."""
        for name, run in absence.forwards.items():
            twin.get_submodule(name).forward = keep(run)
        for name, child in twin.named_modules():
            if name not in absence.forwards and getattr(child, "bias", None) is not None:
                child.register_forward_pre_hook(lambda _, args, name=name: look(name, args))

    run_on_meta(block, inputs, index, hidden_size, prepare)
    if biased:
        raise refuse(f"{biased[0]} of block {index} adds a bias to what a dropped module no longer returns")
