"""Measure perplexity and KL on the held-out text."""

from argparse import Namespace

from evopress.cli.script import argument_parser, run


def main(arguments: Namespace) -> None:
    """Run the stage."""
    from evopress.evaluation.perplexity import evaluate_perplexity

    evaluate_perplexity(
        arguments.results,
        arguments.search,
        arguments.datasets,
        arguments.compute,
        trust_remote_code=arguments.trust_remote_code,
    )


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--search", required=True, help="name of the search, or `dense`")
    parser.add_argument("--datasets", required=True, nargs="+", help="names of the evaluation sets")
    run(parser, main, devices=1)
