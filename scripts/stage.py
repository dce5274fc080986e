"""Run one stage: what every rule of the workflow starts; `python scripts/stage.py search --help` explains one."""

import sys

from evopress.cli.stage import main

if __name__ == "__main__":
    main(sys.argv[1:])
