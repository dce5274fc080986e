"""What a source of text hands on."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")


class Document(NamedTuple):
    """One document; ``name`` says where it comes from, as in ``file.jsonl:12``."""

    name: str
    text: str


class Passage(NamedTuple):
    """A piece from somewhere in a long text, of which no more than one window is taken."""

    name: str
    text: str


class Conversation(NamedTuple):
    """Messages between a user and an assistant, to be put into words by the model's chat template."""

    name: str
    messages: Sequence[Mapping[str, Any]]


AnyDocument = Document | Passage | Conversation


@dataclass(frozen=True)
class Corpus:
    """The documents of one role, in the order of their source."""

    source: str
    """What error messages call it."""
    documents: Iterable[AnyDocument]
    order: Literal["text", "windows", "stream"] = "windows"
    """What the seed chooses: nothing (more), windows of the whole text, or documents of a stream too long to be read
    whole."""
    usual_windows: int | None = None
    """Windows that the field's tables take, where the settings do not say how many tokens; None is all."""
    whole: Iterable[AnyDocument] | None = None
    """All of the text, where ``documents`` leave something out; read if they do not suffice."""


def shuffled(items: Iterable[T], buffer: int, rng: np.random.Generator) -> Iterator[T]:
    """Yield all items in random order, holding only ``buffer`` of them: each slot is refilled from the stream."""
    held: list[T] = []
    for item in items:
        if len(held) < buffer:
            held.append(item)
            continue
        slot = int(rng.integers(buffer))
        yield held[slot]
        held[slot] = item
    for slot in rng.permutation(len(held)):
        yield held[slot]
