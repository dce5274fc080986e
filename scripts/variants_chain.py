"""Compress the linear layers of one block to every level, given the outputs of the compressed blocks before it."""

from argparse import Namespace

from evopress.cli.script import argument_parser, run, settings_argument
from evopress.compression.methods import METHODS


def main(arguments: Namespace) -> None:
    """Run the stage."""
    from evopress.compression.chain import make_chained_variants

    make_chained_variants(
        arguments.results,
        arguments.name,
        arguments.settings,
        arguments.compute,
        arguments.block,
        trust_remote_code=arguments.trust_remote_code,
    )


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--name", required=True, help="name of the variants")
    parser.add_argument("--block", required=True, type=int, help="index of the block")
    settings_argument(parser, METHODS, "variants")
    run(parser, main, devices=1)
