"""Write the comparison table and the report."""

from argparse import Namespace
from pathlib import Path

from evopress.cli.script import argument_parser, run


def main(arguments: Namespace) -> None:
    """Run the stage."""
    from evopress.artifacts.paths import HUGGINGFACE
    from evopress.config.context import StageContext
    from evopress.report.page import write_report

    context = StageContext(arguments.results)
    exports = [arguments.results.export(search, HUGGINGFACE) for search in arguments.searches]
    write_report(context, arguments.searches, exports, arguments.sections)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--searches", required=True, nargs="*", help="names of the searches")
    parser.add_argument("--sections", default=[], nargs="*", type=Path, help="tables of sections to include")
    run(parser, main)
