"""`python -m evopress watch`: what a run does right now, from its logs and from what its searches resume from."""

import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.live import Live

from evopress.artifacts.paths import Run
from evopress.report.live import Watcher
from evopress.util.errors import ArtifactError

_PIPE_WIDTH = 120
"""Characters of a line where there is no terminal."""


def watch(run: Run, seconds: float, *, once: bool) -> None:
    """Show the run until `q` or Ctrl-C, neither of which it notices.

    Args:
        run: its jobs may run anywhere.
        seconds: between two looks.
        once: print what there is to see now, and end.

    Raises:
        ArtifactError: there is no such folder.
    """
    if not run.root.is_dir():
        raise ArtifactError(f"{run.root}: is no folder; give that of the run, results/<name>")
    watcher = Watcher(run)
    console = Console()
    if once or not console.is_terminal:
        (console if console.is_terminal else Console(width=_PIPE_WIDTH)).print(watcher.frame())
        return
    with _single_keys(), suppress(KeyboardInterrupt), Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(watcher.frame(), refresh=True)
            if _key(seconds) == "q":
                break
    console.print(watcher.frame())  # what was seen last stays on the terminal


@contextmanager
def _single_keys() -> Iterator[None]:
    """Let keys be read one by one, without Enter, where they come from a terminal."""
    if not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _key(seconds: float) -> str:
    """The key that is pressed within so many seconds, or none; other input than a terminal's has none."""
    if not sys.stdin.isatty():  # at its end, it is always ready
        time.sleep(seconds)
        return ""
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return sys.stdin.read(1) if ready else ""
