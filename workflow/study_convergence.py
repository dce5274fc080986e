"""Count the generations that the engine takes on linear objectives."""

from argparse import Namespace

from evopress.cli.script import argument_parser, run, settings_argument
from studies.convergence import measure_convergence
from studies.settings import ConvergenceSettings


def main(arguments: Namespace) -> None:
    """Run the stage."""
    measure_convergence(arguments.results, arguments.settings)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    settings_argument(parser, ConvergenceSettings, "studies.convergence")
    run(parser, main)
