"""Compare searches that only differ in their seed as one."""

from argparse import Namespace

from evopress.cli.script import argument_parser, run, settings_argument
from evopress.config.studies import ReportedStudies


def main(arguments: Namespace) -> None:
    """Run the stage."""
    from evopress.studies.compare_searches import compare_searches

    compare_searches(arguments.results, arguments.settings.groups)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    settings_argument(parser, ReportedStudies, "studies")
    run(parser, main)
