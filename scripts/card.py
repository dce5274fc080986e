"""Write the model card of a compressed model, with what was measured of it."""

from argparse import Namespace

from evopress.cli.script import argument_parser, run


def main(arguments: Namespace) -> None:
    """Run the stage."""
    from evopress.export.card import write_card

    write_card(arguments.results, arguments.search)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--search", required=True, help="name of the search")
    run(parser, main)
