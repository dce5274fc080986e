"""Write a model without some of its modules in the layout of DeciLM, for vLLM."""

from argparse import Namespace

from evopress.cli.script import argument_parser, run


def main(arguments: Namespace) -> None:
    """Run the stage."""
    from evopress.config.context import StageContext
    from evopress.export.exporters.decilm import DeciLm
    from evopress.export.stage import run_export

    context = StageContext(arguments.results, arguments.compute, arguments.trust_remote_code)
    run_export(context, arguments.search, DeciLm())


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--search", required=True, help="name of the search")
    run(parser, main)
