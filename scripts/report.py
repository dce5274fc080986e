"""Write the comparison table and the report."""

from argparse import Namespace

from evopress.cli.script import argument_parser, run
from evopress.config.base import parse_json
from evopress.config.studies import ReportedStudies


def main(arguments: Namespace) -> None:
    """Run the stage."""
    from evopress.report.page import write_report

    write_report(arguments.results, arguments.searches, arguments.studies)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--searches", required=True, nargs="*", help="names of the searches")
    parser.add_argument(
        "--studies",
        default=ReportedStudies(),
        type=lambda text: parse_json(ReportedStudies, text, "studies"),
        help="studies to report, as JSON",
    )
    run(parser, main)
