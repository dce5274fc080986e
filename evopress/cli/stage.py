"""Run one stage from a command line: its arguments are the parameters of the stage's function.

What all stages share is here too: the log, threads, leased devices, and errors told in one line.
"""

import argparse
import importlib
import inspect
import logging
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from evopress.artifacts.atomic import explain, is_lack_of_space_or_access
from evopress.artifacts.manifest import set_aside
from evopress.artifacts.paths import Run
from evopress.compression.base import Method
from evopress.compression.methods import METHODS
from evopress.config.base import Section, parse_json
from evopress.config.context import ComputeSettings, StageContext
from evopress.config.plugins import Registry
from evopress.export.base import Exporter
from evopress.export.exporters import EXPORTERS
from evopress.search.base import EffectsSettings, Strategy
from evopress.search.strategies import STRATEGIES
from evopress.util.accelerators import leased
from evopress.util.errors import INTERRUPTED, DamagedError, EvopressError
from evopress.util.job_logs import FINISHED, cost_since, started
from evopress.util.progress import leave, log, note, setup_logging
from evopress.workflow.searches import with_file
from evopress.workflow.stages import STAGES, Stage

PLUGINS: dict[type[Section], Registry[Any]] = {Method: METHODS, Strategy: STRATEGIES, Exporter: EXPORTERS}
"""Registries by the base class that a parameter is annotated with."""
SHARED = ("context", "run", "trust_remote_code")
"""Parameters that are not options of their own."""


def main(arguments: Sequence[str], stages: Mapping[str, Stage] = STAGES) -> NoReturn:
    """Run the stage that the command line names and leave the process: with 0, or with 1 and an error of one line.

    Ctrl-C ends it with one line, too, and the exit code of shells. SIGTERM (a scheduler's time limit, a cancelled run)
    unwinds the stack, so that temporary files are removed. The devices that the stage uses are its own while it runs.
    """
    since = time.monotonic()
    try:
        parsed, options = parse(arguments, stages)
        setup_logging(parsed.log)
        note(started(platform.node(), os.getpid(), [sys.executable, sys.argv[0], *arguments]))
        signal.signal(signal.SIGTERM, leave)
        context = StageContext(parsed.run, parsed.compute, parsed.trust_remote_code, parsed.key)
        stage = stages[parsed.stage]
        with leased(parsed.compute.device, _devices(stage, context, options)):
            _set_threads(parsed.compute.threads)
            function = _function(stage)
            named = inspect.signature(function).parameters
            function(**{name: value for name, value in _shared(context).items() if name in named}, **options)
        log.info("%s", cost_since(since))
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
    note(FINISHED)
    sys.exit(0)


def _shared(context: StageContext) -> dict[str, Any]:
    """What the function of a stage may take beside its options, by the name of its parameter."""
    return {
        "context": context,
        "run": context.run,
        "trust_remote_code": context.trust_remote_code,
    }


def parse(arguments: Sequence[str], stages: Mapping[str, Stage] = STAGES) -> tuple[argparse.Namespace, dict[str, Any]]:
    """What all stages share, and the options of the stage that is named, by parameter of its function.

    Raises:
        ConfigError: settings are wrong.
    """
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--run", required=True, type=lambda text: Run(Path(text)), help="folder of the run")
    shared.add_argument("--compute", default=ComputeSettings(), type=_compute, help="the `compute` settings as JSON")
    shared.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    shared.add_argument("--key", default="", help="digest of all that the result depends on, kept with it")
    shared.add_argument("--log", type=Path, help="file to log to")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=stages, metavar="STAGE", help=", ".join(stages))
    named = parser.parse_args(arguments[:1]).stage
    function = _function(stages[named])
    about = (inspect.getdoc(function) or "").split("\n\n")[0]
    own = argparse.ArgumentParser(prog=f"{parser.prog} {named}", description=about, parents=[shared])
    hints = get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters
    names = [name for name, one in parameters.items() if name not in SHARED and one.kind is not one.KEYWORD_ONLY]
    for name in names:
        _add_option(own, name, hints[name])
    parsed = own.parse_args(arguments[1:])
    parsed.stage = named
    return parsed, {name: getattr(parsed, name) for name in names}


def _add_option(parser: argparse.ArgumentParser, name: str, kind: Any) -> None:
    """An option for a parameter: numbers and texts as they are, several of them in a row, settings as JSON."""
    option = f"--{name.replace('_', '-')}"
    if get_origin(kind) in (tuple, list, Sequence):
        parser.add_argument(option, nargs="*", required=True, type=get_args(kind)[0])
    elif get_origin(kind) is Literal:
        parser.add_argument(option, required=True, choices=get_args(kind))
    elif get_origin(kind) is UnionType and type(None) in get_args(kind):
        parser.add_argument(option, type=get_args(kind)[0])
    elif kind in (int, str):
        parser.add_argument(option, required=True, type=kind)
    else:
        parser.add_argument(option, required=True, type=lambda text: _settings(kind, text, name), help="as JSON")


def _settings(kind: Any, text: str, where: str) -> Any:
    """Settings of a kind: of a plug-in, of a section, or of a union of sections."""
    for base, registry in PLUGINS.items():
        if isinstance(kind, type) and issubclass(kind, base):
            parsed = parse_json(registry, text, where)
            return with_file(parsed, f"{where}.target.file") if isinstance(parsed, Strategy) else parsed
    return parse_json(kind, text, where)


def _compute(text: str) -> ComputeSettings:
    return parse_json(ComputeSettings, text, "compute")


def _function(stage: Stage) -> Callable[..., None]:
    return getattr(importlib.import_module(stage.module), stage.function)


def _devices(stage: Stage, context: StageContext, options: dict[str, Any]) -> int:
    """Devices that the stage uses: one, or one for each process of a search."""
    shared_out = [option for option in options.values() if isinstance(option, Strategy | EffectsSettings)]
    processes = shared_out[0].workers(context.compute.processes) if shared_out else 1
    return processes * stage.gpu


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


def _set_threads(threads: int | None) -> None:
    if threads:
        import torch  # only here: reading the arguments must not take seconds

        torch.set_num_threads(threads)
