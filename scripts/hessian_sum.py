"""Sum the Hessians of one block over the shards of the calibration tokens."""

from argparse import Namespace

from evopress.cli.script import argument_parser, run


def main(arguments: Namespace) -> None:
    """Run the stage."""
    from evopress.compression.hessian import sum_hessians

    sum_hessians(arguments.results, arguments.block, arguments.shards)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--block", required=True, type=int, help="index of the block")
    parser.add_argument("--shards", required=True, type=int, help="number of shards")
    run(parser, main)
