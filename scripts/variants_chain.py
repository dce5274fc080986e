"""Compress the linear layers of one block to every level, given the outputs of the compressed blocks before it."""

from argparse import Namespace

from evopress.cli.script import argument_parser, run, settings_argument
from evopress.compression.methods import METHODS
from evopress.compression.sequential import make_sequential_variants
from evopress.config.context import StageContext


def main(arguments: Namespace) -> None:
    """Run the stage."""

    context = StageContext(arguments.results, arguments.compute, arguments.trust_remote_code)
    make_sequential_variants(context, arguments.name, arguments.settings, arguments.block)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--name", required=True, help="name of the variants")
    parser.add_argument("--block", required=True, type=int, help="index of the block")
    settings_argument(parser, METHODS, "variants")
    run(parser, main, devices=1)
