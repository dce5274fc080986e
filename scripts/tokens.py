"""Turn the text of one data set into sequences of tokens."""

from argparse import Namespace

from evopress.cli.script import argument_parser, run, settings_argument
from evopress.config.data import Role, TextSettings


def main(arguments: Namespace) -> None:
    """Run the stage."""
    from evopress.data.tokens import write_tokens

    role: Role = "evaluation" if arguments.dataset not in ("calibration", "search") else arguments.dataset
    write_tokens(
        arguments.dataset, role, arguments.settings, arguments.results, trust_remote_code=arguments.trust_remote_code
    )


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--dataset", required=True, help="calibration, search, or the name of an evaluation set")
    settings_argument(parser, TextSettings, "data")
    run(parser, main)
