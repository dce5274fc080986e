"""Look for pairs of candidates of which the one that should be better is worse."""

from argparse import Namespace

from evopress.cli.script import argument_parser, run, settings_argument
from studies.monotonicity import measure_monotonicity
from studies.settings import MonotonicitySettings


def main(arguments: Namespace) -> None:
    """Run the stage."""
    measure_monotonicity(
        arguments.results,
        arguments.name,
        arguments.settings,
        arguments.compute,
        trust_remote_code=arguments.trust_remote_code,
    )


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--name", required=True, help="name of the study")
    settings_argument(parser, MonotonicitySettings, "studies.monotonicity")
    run(parser, main, devices=1)
