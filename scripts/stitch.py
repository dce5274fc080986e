"""Assemble the compressed model that a search chose."""

from argparse import Namespace

from evopress.cli.script import argument_parser, run


def main(arguments: Namespace) -> None:
    """Run the stage."""
    from evopress.export.run import stitch_model

    stitch_model(arguments.results, arguments.search, trust_remote_code=arguments.trust_remote_code)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--search", required=True, help="name of the search")
    run(parser, main)
