"""Commands that messages advise: lines of a shell that work when pasted."""

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path


def snakemake_command(target: Path, configs: Sequence[Path]) -> str:
    """The line that makes one file with the settings of ``configs``, in the folder where this process runs."""
    laid_over = ["--configfile", *map(str, configs)] if configs else []
    return shlex.join([*_snakemake(), "--cores", "all", str(target), *laid_over])


def _snakemake() -> list[str]:
    """How to start the Snakemake of this Python; by name alone where that is the one that a shell finds."""
    beside = Path(sys.executable).with_name("snakemake")
    if not beside.exists():
        return [sys.executable, "-m", "snakemake"]
    found = shutil.which("snakemake")
    if found and beside.samefile(found):
        return ["snakemake"]
    return [str(beside.relative_to(Path.cwd())) if beside.is_relative_to(Path.cwd()) else str(beside)]
