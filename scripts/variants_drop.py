"""List the modules that may be dropped."""

from argparse import Namespace

from evopress.cli.script import argument_parser, run, settings_argument
from evopress.compression.methods.drop import Drop, make_module_table
from evopress.config.context import StageContext


def main(arguments: Namespace) -> None:
    """Run the stage."""
    context = StageContext(arguments.results, arguments.compute, arguments.trust_remote_code)
    make_module_table(context, arguments.name, arguments.settings)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--name", required=True, help="name of the variants")
    settings_argument(parser, Drop, "variants")
    run(parser, main)
