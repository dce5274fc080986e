"""Choose a level for every unit."""

from argparse import Namespace

from evopress.cli.script import argument_parser, run, settings_argument
from evopress.search.strategies import STRATEGIES
from evopress.workflow.devices import devices_of_search


def main(arguments: Namespace) -> None:
    """Run the stage."""
    from evopress.search.run import run_search

    run_search(
        arguments.results,
        arguments.name,
        arguments.settings,
        arguments.compute,
        trust_remote_code=arguments.trust_remote_code,
    )


def devices(arguments: Namespace) -> int:
    """Devices that the search uses."""
    return devices_of_search(arguments.settings, arguments.compute)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--name", required=True, help="name of the search")
    settings_argument(parser, STRATEGIES, "searches")
    run(parser, main, devices)
