"""`python -m evopress export-config`: write what a search chose as text, in the format published with the paper."""

import argparse
from pathlib import Path

from evopress.artifacts.paths import Run
from evopress.cli.output import add_output_arguments, emit
from evopress.search.configuration import Configuration


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("results", type=Path, help="folder of the run, as in results/smollm2-78mb")
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
    return Configuration.read(results, search).text(results)
