"""Write the comparison table and the report."""

from argparse import Namespace

from evopress.report.page import write_report
from evopress.script import argument_parser, run


def main(arguments: Namespace) -> None:
    """Run the stage."""
    write_report(arguments.results, arguments.searches)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--searches", required=True, nargs="*", help="names of the searches")
    run(parser, main)
