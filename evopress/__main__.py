"""`python -m evopress COMMAND`: what is asked by hand, beside the workflow."""

import argparse
import sys

from evopress.cli import export_config as export_command
from evopress.cli import export_imatrix as imatrix_command
from evopress.cli import import_config as import_command
from evopress.cli import plan, verify
from evopress.util.errors import INTERRUPTED, EvopressError

COMMANDS = {
    "plan": plan,
    "import-config": import_command,
    "export-config": export_command,
    "export-imatrix": imatrix_command,
    "verify": verify,
}
"""Modules with a first line that says what the command does, `add_arguments` and `run`."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m evopress", description="Compress language models by evolution.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        about = (module.__doc__ or "").strip().splitlines()[0].partition(": ")[2]
        command = commands.add_parser(name, help=about, description=about)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    parsed = parser.parse_args(arguments)
    try:
        parsed.run(parsed)
    except EvopressError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
