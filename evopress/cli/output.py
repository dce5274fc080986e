"""Text that a command prints, or writes to a file if asked to."""

import argparse
import sys
from pathlib import Path

from evopress.artifacts.atomic import atomic_file
from evopress.util.errors import ArtifactError


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """`--output` and `--force`."""
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there instead of printing")
    parser.add_argument("--force", action="store_true", help="replace the file if it is there")


def emit(text: str, output: Path | None, *, force: bool) -> None:
    """Print ``text``, or write it whole to ``output``.

    Raises:
        ArtifactError: the file is there and may not be replaced, or it cannot be written.
    """
    if output is None:
        sys.stdout.write(text)
        return
    require_free(output, force=force)
    with atomic_file(output) as temporary:
        temporary.write_text(text, encoding="utf-8")


def require_free(output: Path, *, force: bool) -> None:
    """Refuse to replace a file unasked.

    Raises:
        ArtifactError: it is there.
    """
    if output.exists() and not force:
        raise ArtifactError(f"{output}: is there already; give another name, or --force to replace it")
