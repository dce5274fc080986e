"""Write the compact archive of a compressed model."""

from argparse import Namespace

from evopress.cli.script import argument_parser, run


def main(arguments: Namespace) -> None:
    """Run the stage."""
    from evopress.config.context import StageContext
    from evopress.export.exporters.archive import Archive
    from evopress.export.stage import run_export

    context = StageContext(arguments.results, arguments.compute, arguments.trust_remote_code)
    run_export(context, arguments.search, Archive())


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--search", required=True, help="name of the search")
    run(parser, main)
