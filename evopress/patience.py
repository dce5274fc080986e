"""Asking again, ever later, what does not answer at once."""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from evopress.errors import brief
from evopress.progress import log

T = TypeVar("T")


def patiently(
    ask: Callable[[], T],
    waits: Sequence[float],
    about: str,
    lasting: Callable[[Exception], Exception | None],
    away: Callable[[int, str], Exception],
    *,
    catch: tuple[type[Exception], ...] = (Exception,),
    sleep: Callable[[float], None] | None = None,
) -> T:
    """What ``ask`` returns, in one attempt more than there are ``waits``.

    Args:
        ask: raises one of ``catch`` where it does not answer, or refuses.
        waits: seconds before each further attempt.
        about: what is asked for, for the log.
        lasting: the error to raise where another attempt would not help, else None.
        away: the error to raise in the end, from the number of attempts and the reason of the last.
        catch: exceptions that are looked at; others pass.
        sleep: waits; `time.sleep` unless given.

    Raises:
        what ``lasting`` and ``away`` return.
    """
    for wait in (*waits, None):
        try:
            return ask()
        except catch as error:
            if (final := lasting(error)) is not None:
                raise final from error
            reason = brief(error)
            if wait is None:
                raise away(len(waits) + 1, reason) from error
            log.warning("%s: the hub does not answer (%s); next attempt in %g s", about, reason, wait)
            (sleep or time.sleep)(wait)
    raise AssertionError("the last attempt returns or raises")
