"""`python -m evopress COMMAND`: what is asked by hand, beside the workflow."""

import sys

from evopress.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
