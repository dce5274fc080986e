"""`python -m evopress export-config`: write what a search chose as text, in the format published with the paper."""

import argparse
from pathlib import Path

import pandas as pd

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import LAYERS, read_table
from evopress.cli.output import add_output_arguments, emit
from evopress.compression.families import DROP, family_of
from evopress.search.configuration import read_configuration
from evopress.search.text_format import format_drops, format_levels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("results", type=Path, help="folder of the run, as in results/smollm2-3bit")
    parser.add_argument("search", help="name of the search")
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print or write the text."""
    emit(exported(Run(arguments.results), arguments.search), arguments.output, force=arguments.force)


def exported(results: Run, search: str) -> str:
    """Text of the configuration of a search.

    Raises:
        ArtifactError: an artifact is missing, damaged, or of another model.
    """
    configuration = read_configuration(results, search)
    if family_of(configuration).takes_modules:
        layers = read_table(results.layers, LAYERS)
        return format_drops(_dropped(configuration, int(layers["block"].max()) + 1))
    return format_levels(zip(configuration["unit"], configuration["level"], strict=True))


def _dropped(configuration: pd.DataFrame, blocks: int) -> list[frozenset[str]]:
    """Kinds of modules that each block loses; what was not searched stays."""
    gone = configuration[configuration["level"] == DROP]
    return [frozenset(gone.loc[gone["block"] == block, "layer"]) for block in range(blocks)]
