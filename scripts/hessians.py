"""Accumulate the Hessians of all blocks from one shard of the calibration tokens."""

from argparse import Namespace

from evopress.cli.script import argument_parser, run, settings_argument
from evopress.config.context import StageContext
from evopress.config.hessians import HessianSettings


def main(arguments: Namespace) -> None:
    """Run the stage."""
    from evopress.compression.hessian import accumulate_hessians

    context = StageContext(arguments.results, arguments.compute, arguments.trust_remote_code)
    accumulate_hessians(context, arguments.settings, arguments.shard)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--shard", required=True, type=int, help="number of the shard, from 0")
    settings_argument(parser, HessianSettings, "hessians")
    run(parser, main, devices=1)
