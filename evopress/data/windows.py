"""Sequences of one length out of documents of any length: packed, not padded; split, not cut.

Documents follow one another with a separator between them, and the stream is cut every ``length`` tokens. No token is
lost but the last incomplete window, and long documents count as much as they are long.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np


class Encoded(NamedTuple):
    """A document as tokens: int32 [tokens]."""

    name: str
    tokens: np.ndarray


class Window(NamedTuple):
    """A sequence: int32 [length], and the names of the documents in it, in order."""

    documents: tuple[str, ...]
    tokens: np.ndarray


def pack(
    documents: Iterable[Encoded], length: int, separator: int | None = None, start: int | None = None
) -> Iterator[Window]:
    """Cut the stream of all documents into windows of ``length`` tokens, reading no further than needed.

    Args:
        documents: in order; empty ones leave no trace.
        length: tokens of a window.
        separator: token put between two documents (it counts to the first of them), or None for none.
        start: token put before a window that does not begin with it by itself, or None for none.
    """
    parts: list[Encoded] = []  # what the window under construction holds
    held = 0
    last: str | None = None
    for name, tokens in documents:
        if not len(tokens):
            continue
        pieces = [Encoded(name, tokens)]
        if last is not None and separator is not None:
            pieces.insert(0, _single(last, separator))
        last = name
        for piece in pieces:
            rest = piece.tokens
            while len(rest):
                if not held and start is not None and rest[0] != start:
                    parts, held = [_single(piece.name, start)], 1
                taken, rest = rest[: length - held], rest[length - held :]
                parts.append(Encoded(piece.name, taken))
                held += len(taken)
                if held == length:
                    yield _window(parts)
                    parts, held = [], 0


def _single(name: str, token: int) -> Encoded:
    return Encoded(name, np.array([token], dtype=np.int32))


def _window(parts: list[Encoded]) -> Window:
    """Join the parts; a document in several neighbouring parts is named once."""
    names = dict.fromkeys(part.name for part in parts)
    return Window(tuple(names), np.concatenate([part.tokens for part in parts]).astype(np.int32))


def choose(windows: Iterable[Window], count: int | None, rng: np.random.Generator | None) -> list[Window]:
    """Take ``count`` windows (all, if None): the first ones without ``rng``, else a random choice in random order."""
    if rng is None:
        return list(islice(windows, count))
    pool = list(windows)
    return [pool[i] for i in rng.permutation(len(pool))[:count]]
