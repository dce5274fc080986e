"""Write a model without some of its modules in the layout of DeciLM, for vLLM."""

from argparse import Namespace

from evopress.cli.script import argument_parser, run


def main(arguments: Namespace) -> None:
    """Run the stage."""
    from evopress.export.decilm import write_decilm

    write_decilm(arguments.results, arguments.search)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--search", required=True, help="name of the search")
    run(parser, main)
