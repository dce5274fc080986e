"""Commands that are asked by hand, beside the workflow: what each takes, and which part of the package answers it.

What takes long to import is imported once a command runs: the list of commands must not take seconds.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from evopress.artifacts.atomic import atomic_file
from evopress.artifacts.paths import Run
from evopress.util.errors import INTERRUPTED, ArtifactError, EvopressError
from evopress.workflow.settings import DEFAULT, load_settings


class Command(NamedTuple):
    """A command; the first line of its function's docstring says what it does."""

    run: Callable[..., None]
    """Takes its arguments by name."""
    arguments: tuple[tuple[tuple[str, ...], dict[str, Any]], ...]


COMMANDS: dict[str, Command] = {}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m evopress", description="Compress language models by evolution.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, command in COMMANDS.items():
        about = (command.run.__doc__ or "").splitlines()[0]
        own = commands.add_parser(name, help=about, description=about)
        for names, options in command.arguments:
            own.add_argument(*names, **options)
    parsed = vars(parser.parse_args(arguments))
    try:
        COMMANDS[parsed.pop("command")].run(**parsed)
    except EvopressError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _argument(*names: str, **options: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """What `ArgumentParser.add_argument` takes."""
    return names, options


def _command(
    name: str, *arguments: tuple[tuple[str, ...], dict[str, Any]]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command."""

    def register(run: Callable[..., None]) -> Callable[..., None]:
        """Register ``run`` under the name, and return it as it is."""
        COMMANDS[name] = Command(run, arguments)
        return run

    return register


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of devices")
    return value


def _memory(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no amount of memory")
    return value


_RESULTS = _argument("results", type=Path, help="folder of the run, results/<name>")
_SEARCH = _argument("search", help="name of the search")
_CONFIG = _argument("config", nargs="*", type=Path, help=f"files laid over {DEFAULT}, one after the other")
_OUTPUT = _argument("--output", type=Path, metavar="FILE", help="write there instead of printing")
_FORCE = _argument("--force", action="store_true", help="replace the file if it is there")


@_command(
    "plan",
    _CONFIG,
    _argument(
        "--device-memory-gb",
        nargs="+",
        type=_memory,
        default=[],
        metavar="GB",
        help="plan for accelerators with so much memory, of which a search gets 80 %",
    ),
    _argument("--rates", type=Path, metavar="FILE", help="measured rates, as in the check.json of a machine"),
    _argument("--devices", type=_count, metavar="N", help="devices that jobs share (default: one a process)"),
)
def plan_command(
    config: Sequence[Path], device_memory_gb: Sequence[float], rates: Path | None, devices: int | None
) -> None:
    """What a run will need, before anything runs."""
    settings = load_settings(config)
    from evopress.plan.text import Rates, plan  # after settings are checked, as it imports transformers

    run, measured = Run(Path("results") / settings.name), None if rates is None else Rates.read(rates)
    print(plan(settings, run, device_memory_gb, config, measured, devices))


@_command(
    "import-config",
    _argument("file", type=Path, help="text configuration: `layer: level` or dropped modules, line by line"),
    _argument("search", help="name that the search shall have"),
    _CONFIG,
    _argument("--variants", help="variants that the levels are of, if the search is not in the settings"),
    _argument("--target", type=float, help="budget, if the search is not in the settings"),
    _OUTPUT,
    _FORCE,
)
def import_command(
    file: Path,
    search: str,
    config: Sequence[Path],
    variants: str | None,
    target: float | None,
    output: Path | None,
    force: bool,
) -> None:
    """Check a text configuration against a model, and print settings that use it."""
    from evopress.cli.import_config import imported

    _emit(imported(file, search, config, variants, target), output, force=force)


@_command("export-config", _RESULTS, _SEARCH, _OUTPUT, _FORCE)
def export_command(results: Path, search: str, output: Path | None, force: bool) -> None:
    """Write what a search chose as text, in the format published with the paper."""
    from evopress.search.configuration import Configuration

    run = Run(results)
    _emit(Configuration.read(run, search).text(run), output, force=force)


@_command(
    "export-imatrix",
    _RESULTS,
    _argument("--output", type=Path, metavar="FILE", help="write there instead of RESULTS/imatrix.FORMAT"),
    _argument("--output-format", choices=("gguf", "dat"), default="gguf", help="`dat` is that of before 2025"),
    _FORCE,
)
def imatrix_command(results: Path, output: Path | None, output_format: Literal["gguf", "dat"], force: bool) -> None:
    """Write a run's Hessians as an imatrix for llama.cpp's quantizer."""
    from evopress.export.gguf.imatrix import imatrix_of, write_imatrix

    path = output or results / f"imatrix.{output_format}"
    _require_free(path, force=force)
    imatrix = imatrix_of(Run(results))
    write_imatrix(imatrix, path, output_format)
    print(f"{path}: {len(imatrix.sums)} weights, {imatrix.tokens} tokens of {imatrix.text}")
    print(f"llama-quantize --imatrix {path} model-f16.gguf model.gguf IQ3_S")


@_command("verify", _RESULTS)
def verify_command(results: Path) -> None:
    """Read every file of a run again and compare it with its checksum."""
    from evopress.cli.verify import verify

    verify(Run(results))


@_command(
    "watch",
    _argument("results", type=Path, help="folder of the run, results/<name>; jobs may run anywhere"),
    _argument("--once", action="store_true", help="print what there is to see now, and end"),
    _argument("--seconds", type=float, default=2.0, help="between two looks"),
)
def watch_command(results: Path, once: bool, seconds: float) -> None:
    """What a run does right now, from its logs and from what its searches resume from."""
    from evopress.cli.watch import watch

    watch(Run(results), seconds, once=once)


@_command(
    "push",
    _RESULTS,
    _SEARCH,
    _argument("exporter", help="which of its exports, as in gguf"),
    _argument("--repo", required=True, help="repository, as in user/name; it is made if it is not there"),
    _argument("--private", action="store_true", help="make a private repository"),
    _argument("--dry-run", action="store_true", help="check and list what would be uploaded, and end"),
)
def push_command(results: Path, search: str, exporter: str, repo: str, private: bool, dry_run: bool) -> None:
    """Upload a finished export with its model card to a repository of the Hugging Face hub."""
    from evopress.export.push import check_repository, prepare_upload, push

    check_repository(repo)
    upload = prepare_upload(Run(results), search, exporter)
    for name, size in upload.files.items():
        print(f"{size / 1e6:12,.1f} MB  {name}")
    total = f"{sum(upload.files.values()) / 1e6:,.1f} MB in {len(upload.files)} files"
    if dry_run:
        print(f"{total} would go to {repo}")
        return
    from huggingface_hub import HfApi

    print(f"{total}: {push(upload, repo, HfApi(), private=private)}")


@_command(
    "track",
    _argument("results", type=Path, help="folder of the run, results/<name>, which may still go on"),
    _argument(
        "--tensorboard",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for TensorBoard's events; what an earlier call wrote there is replaced",
    ),
)
def track_command(results: Path, tensorboard: Path) -> None:
    """Hand what searches and evaluations found to a tracker of experiments."""
    from evopress.report.track import write_events

    written = write_events(Run(results), tensorboard)
    if not written:
        raise ArtifactError(f"{results}: no search has begun there; give the folder of a run, results/<name>")
    for model, points in written.items():
        print(f"{model}: {points} points")


def _emit(text: str, output: Path | None, *, force: bool) -> None:
    """Print ``text``, or write it whole to ``output``.

    Raises:
        ArtifactError: the file is there and may not be replaced, or it cannot be written.
    """
    if output is None:
        sys.stdout.write(text)
        return
    _require_free(output, force=force)
    with atomic_file(output) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _require_free(output: Path, *, force: bool) -> None:
    """Refuse to replace a file unasked.

    Raises:
        ArtifactError: it is there.
    """
    if output.exists() and not force:
        raise ArtifactError(f"{output}: is there already; give another name, or --force to replace it")
