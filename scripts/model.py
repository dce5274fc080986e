"""Bring the dense model into the results folder and list its linear layers."""

from argparse import Namespace

from evopress.cli.script import argument_parser, run, settings_argument
from evopress.config.model import ModelSettings


def main(arguments: Namespace) -> None:
    """Run the stage."""
    from evopress.models.sources import prepare_model

    settings = arguments.settings.model_copy(update={"blocks": arguments.blocks})
    prepare_model(settings, arguments.results)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    settings_argument(parser, ModelSettings, "model")
    parser.add_argument("--blocks", type=int, help="number of blocks that the other jobs were planned for")
    run(parser, main)
