"""Run one stage: what every rule of the workflow starts; `python scripts/stage.py search --help` explains one."""

import sys

try:
    from evopress.cli.stage import main
except KeyboardInterrupt:  # Ctrl-C before the stage can say so itself
    print("interrupted", file=sys.stderr)
    sys.exit(130)

if __name__ == "__main__":
    main(sys.argv[1:])
