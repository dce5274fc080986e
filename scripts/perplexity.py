"""Measure perplexity and KL on the held-out text."""

from argparse import Namespace

from evopress.cli.script import argument_parser, run


def main(arguments: Namespace) -> None:
    """Run the stage."""
    from evopress.config.context import StageContext
    from evopress.evaluation.perplexity import evaluate_perplexity

    context = StageContext(arguments.results, arguments.compute, arguments.trust_remote_code)
    evaluate_perplexity(context, arguments.search, arguments.datasets)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--search", required=True, help="name of the search, or `dense`")
    parser.add_argument("--datasets", required=True, nargs="+", help="names of the evaluation sets")
    run(parser, main, devices=1)
