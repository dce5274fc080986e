"""What every script of the workflow shares: arguments, log, threads, and errors told in one line.

Scripts import this at their top and what takes seconds to import in their stage, where Ctrl-C is met, too.
"""

import argparse
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from evopress.artifacts.atomic import explain, is_lack_of_space_or_access
from evopress.artifacts.manifest import set_aside
from evopress.artifacts.paths import Run
from evopress.config.base import parse_json
from evopress.config.compute import ComputeSettings
from evopress.util.errors import INTERRUPTED, DamagedError, EvopressError
from evopress.util.leases import leased
from evopress.util.progress import setup_logging

log = logging.getLogger("evopress")


def argument_parser(about: str) -> argparse.ArgumentParser:
    """Make a parser with the arguments that all scripts take."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--results", required=True, type=_results, help="folder of the run, results/<name>")
    parser.add_argument("--compute", default=ComputeSettings(), type=_compute, help="the `compute` settings as JSON")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--log", type=Path, help="file to log to")
    return parser


def _results(text: str) -> Run:
    return Run(Path(text))


def _compute(text: str) -> ComputeSettings:
    return parse_json(ComputeSettings, text, "compute")


def settings_argument(parser: argparse.ArgumentParser, kind: object, where: str) -> None:
    """Add ``--settings``: the slice of the settings that the stage depends on; ``where`` names it in errors."""
    parser.add_argument(
        "--settings", required=True, type=lambda text: parse_json(kind, text, where), help=f"`{where}` as JSON"
    )


def run(
    parser: argparse.ArgumentParser,
    stage: Callable[[argparse.Namespace], None],
    devices: int | Callable[[argparse.Namespace], int] = 0,
) -> NoReturn:
    """Parse the command line, run ``stage`` and leave the process: with 0, or with 1 and an error of one line.

    Ctrl-C ends it with one line as well, and the exit code of shells.

    ``devices`` tells how many CUDA devices the stage uses where there are any: they are its own while it runs.
    SIGTERM (a scheduler's time limit, a cancelled run) unwinds the stack, so that temporary files are removed.
    """
    try:
        arguments = parser.parse_args()
        setup_logging(arguments.log)
        signal.signal(signal.SIGTERM, _leave)
        _set_threads(arguments.compute.threads)
        with leased(arguments.compute.device, devices(arguments) if callable(devices) else devices):
            stage(arguments)
    except DamagedError as error:
        _fail(set_aside(error))
    except EvopressError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would only end in a traceback
        log.error("interrupted")
        _print_unless_logged_there("interrupted")
        sys.exit(INTERRUPTED)
    except Exception as error:
        if isinstance(error, OSError) and is_lack_of_space_or_access(error):
            _fail(_advice(error))
        log.exception("unexpected failure")
        raise
    sys.exit(0)


def _advice(error: OSError) -> str:
    """What to do where something else than an artifact could not be written: a log, a temporary file, a cache."""
    path = Path(error.filename or tempfile.gettempdir())
    about = str(explain(error, path))
    if ".cache" in path.parts or path.is_relative_to(os.path.expanduser("~")):  # noqa: PTH111 (Path's raises for a user without an entry)
        return f"{about}; if there is no home folder to write to, set XDG_CACHE_HOME to one that can be written"
    return about


def _fail(message: str) -> NoReturn:
    log.error("%s", message)
    _print_unless_logged_there(f"error: {message}")
    sys.exit(1)


def _print_unless_logged_there(line: str) -> None:
    """Where the log goes to a file alone (bars have the terminal), the terminal still needs to hear of an error."""
    if all(isinstance(handler, logging.FileHandler) for handler in log.handlers):
        print(line, file=sys.stderr)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _set_threads(threads: int | None) -> None:
    if threads:
        import torch  # only here: reading the arguments must not take seconds

        torch.set_num_threads(threads)
