"""Compare searches that only differ in their seed as one."""

from argparse import Namespace

from evopress.cli.script import argument_parser, run, settings_argument
from studies.comparison import compare_searches
from studies.settings import ReportedStudies


def main(arguments: Namespace) -> None:
    """Run the stage."""
    compare_searches(arguments.results, arguments.settings.groups)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    settings_argument(parser, ReportedStudies, "studies")
    run(parser, main)
