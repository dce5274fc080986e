"""Run one study: `python workflow/study.py convergence --help` explains one."""

import sys

from evopress.cli.stage import main
from studies.run import STAGES

if __name__ == "__main__":
    main(sys.argv[1:], STAGES)
