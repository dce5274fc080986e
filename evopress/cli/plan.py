"""`python -m evopress plan`: what a run will need, before anything runs."""

import argparse
from pathlib import Path

from evopress.artifacts.paths import Run
from evopress.workflow.loading import DEFAULT, load_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("config", nargs="*", type=Path, help=f"files laid over {DEFAULT}, one after the other")
    parser.add_argument(
        "--device-memory-gb",
        nargs="+",
        type=_positive,
        default=[],
        metavar="GB",
        help="plan searches for accelerators with so much memory, of which a search gets nine tenths",
    )


def run(arguments: argparse.Namespace) -> None:
    """Print the plan."""
    settings = load_settings(arguments.config)
    from evopress.plan.run import plan  # only here: settings are checked before transformers is imported

    results = Run(Path("results") / settings.name)
    print(plan(settings, results, arguments.device_memory_gb, arguments.config))


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no amount of memory")
    return value
