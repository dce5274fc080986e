"""Write what the report shows of the studies."""

from argparse import Namespace

from evopress.cli.script import argument_parser, run, settings_argument
from studies.report import write_sections
from studies.settings import ReportedStudies


def main(arguments: Namespace) -> None:
    """Run the stage."""
    write_sections(arguments.results, arguments.settings)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    settings_argument(parser, ReportedStudies, "studies")
    run(parser, main)
