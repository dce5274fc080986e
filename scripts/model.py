"""Bring the dense model into the results folder and list its linear layers."""

from argparse import Namespace

from evopress.models.sources import prepare_model

from evopress.config.model import ModelSettings
from evopress.script import argument_parser, run, settings_argument


def main(arguments: Namespace) -> None:
    """Run the stage."""
    prepare_model(arguments.settings, arguments.results)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    settings_argument(parser, ModelSettings, "model")
    run(parser, main)
