"""Run lm-eval tasks."""

from argparse import Namespace

from evopress.cli.script import argument_parser, run, settings_argument
from evopress.config.evaluation import TaskSettings


def main(arguments: Namespace) -> None:
    """Run the stage."""
    from evopress.config.context import StageContext
    from evopress.evaluation.tasks import evaluate_tasks

    context = StageContext(arguments.results, arguments.compute, arguments.trust_remote_code)
    evaluate_tasks(context, arguments.search, arguments.settings)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--search", required=True, help="name of the search, or `dense`")
    settings_argument(parser, TaskSettings, "evaluation.tasks")
    run(parser, main, devices=1)
