"""Progress in the log: every long step tells of itself, short ones that are done many times do not."""

import logging
from collections.abc import Iterator

import pytest

from evopress.util import progress
from evopress.util.progress import log


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Lines of the log, of which there would be one at each advance."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    before = log.level
    log.setLevel(logging.INFO)  # by its setter, which forgets what loggers were found to be enabled for
    log.addHandler(handler)
    yield found
    log.removeHandler(handler)
    log.setLevel(before)


def test_lines_tell_done_of_total_rate_and_time_left(lines: list[str]) -> None:
    with progress.progress("work", 4, "pieces") as bar:
        bar.advance(2, "a note")
    assert lines[0].startswith("work: 2/4 pieces, ")
    assert " pieces/s, " in lines[0] and lines[0].endswith(" s left, a note")


def test_what_is_brief_is_told_of_only_while_it_takes_long(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 60.0)
    for brief in (True, False):
        with progress.progress("work", 1, brief=brief) as bar:
            bar.advance()
    assert len(lines) == 1
