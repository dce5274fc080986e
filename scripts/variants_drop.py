"""List the modules that may be dropped."""

from argparse import Namespace

from evopress.compression.drop import make_module_table
from evopress.config.variants import DropSettings
from evopress.script import argument_parser, run, settings_argument


def main(arguments: Namespace) -> None:
    """Run the stage."""
    make_module_table(arguments.results, arguments.name, arguments.settings)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--name", required=True, help="name of the variants")
    settings_argument(parser, DropSettings, "variants")
    run(parser, main)
