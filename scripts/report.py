"""Write the comparison table and the report."""

from argparse import Namespace
from pathlib import Path

from evopress.cli.script import argument_parser, run


def main(arguments: Namespace) -> None:
    """Run the stage."""
    from evopress.report.page import write_report

    write_report(arguments.results, arguments.searches, arguments.sections)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--searches", required=True, nargs="*", help="names of the searches")
    parser.add_argument("--sections", default=[], nargs="*", type=Path, help="tables of sections to include")
    run(parser, main)
