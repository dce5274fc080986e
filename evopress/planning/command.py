"""`python -m evopress plan`: what a run will need, before anything runs."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from evopress.artifacts.paths import Results
from evopress.config.settings import Settings, lay_over
from evopress.errors import ConfigError

DEFAULT = Path("config/config.yaml")


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
    from evopress.planning.run import plan  # only here: settings are checked before transformers is imported

    print(plan(settings, Results(Path("results") / settings.name), arguments.device_memory_gb))


def load_settings(overlays: Sequence[Path]) -> Settings:
    """Settings as the workflow takes them: overlays over the default, unless they say that they are complete.

    Raises:
        ConfigError: a file is missing or no YAML, or the settings are wrong.
    """
    values: dict[str, Any] = {}
    for path in overlays:
        values = lay_over(values, read_yaml(path))
    if not values.get("complete"):
        values = lay_over(read_yaml(DEFAULT), values)
    return Settings.load(values)


def read_yaml(path: Path) -> dict[str, Any]:
    """Settings in a file.

    Raises:
        ConfigError: it is missing, or no mapping in YAML.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: missing; check the path, or start in the project's folder") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds no settings (a mapping in YAML)")
    return values


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no amount of memory")
    return value
