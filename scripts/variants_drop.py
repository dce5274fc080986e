"""List the modules that may be dropped."""

from argparse import Namespace

from evopress.cli.script import argument_parser, run, settings_argument
from evopress.compression.settings import DropSettings


def main(arguments: Namespace) -> None:
    """Run the stage."""
    from evopress.compression.drop import make_module_table

    make_module_table(arguments.results, arguments.name, arguments.settings)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--name", required=True, help="name of the variants")
    settings_argument(parser, DropSettings, "variants")
    run(parser, main)
