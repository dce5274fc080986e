"""Asking again, ever later, what does not answer at once."""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_chain, wait_fixed

from evopress.util.errors import EvopressError, brief
from evopress.util.progress import log

T = TypeVar("T")
WAITS = (5.0, 30.0)
"""Seconds before each new attempt to read a data set; the hub's client retries by itself, too."""


def patiently(
    ask: Callable[[], T],
    waits: Sequence[float],
    about: str,
    lasting: Callable[[Exception], EvopressError | None],
    away: Callable[[int, str], EvopressError],
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

    def attempt() -> T:
        """Ask once; what another attempt would not mend is raised in its final form."""
        try:
            return ask()
        except catch as error:
            if (final := lasting(error)) is not None:
                raise final from error
            raise

    def tell(state: RetryCallState) -> None:
        """Log why another attempt is made, and when."""
        assert state.outcome and state.next_action
        reason, wait = brief(state.outcome.exception() or Exception()), state.next_action.sleep
        log.warning("%s: the hub does not answer (%s); next attempt in %g s", about, reason, wait)

    retrying = Retrying(
        retry=retry_if_exception(lambda error: isinstance(error, catch) and not isinstance(error, EvopressError)),
        wait=wait_chain(*map(wait_fixed, waits)),
        stop=stop_after_attempt(len(waits) + 1),
        sleep=sleep or time.sleep,
        before_sleep=tell,
        reraise=True,
    )
    try:
        return retrying(attempt)
    except EvopressError:
        raise
    except catch as error:
        raise away(len(waits) + 1, brief(error)) from error


def causes(error: BaseException | None) -> list[BaseException]:
    """An error, and all that it came from."""
    links = []
    while error is not None:
        links.append(error)
        error = error.__cause__ or error.__context__
    return links


def is_transient(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, may go away by itself: time-outs, lost connections, a busy server."""
    from datasets.utils.file_utils import CONNECTION_ERRORS_TO_RETRY
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    links = causes(error)
    offline = OfflineModeIsEnabled.__name__  # `datasets` makes a lost connection of it, and only names it
    if any(isinstance(link, OfflineModeIsEnabled) or offline in str(link) for link in links):
        return False
    for link in links:
        if isinstance(link, HfHubHTTPError):
            return link.response.status_code == 429 or link.response.status_code >= 500
        if isinstance(link, (ConnectionError, TimeoutError, *CONNECTION_ERRORS_TO_RETRY)):
            return True
    return False
