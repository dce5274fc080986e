"""`python -m evopress export-imatrix`: write a run's Hessians as an imatrix for llama.cpp's quantizer."""

import argparse
from pathlib import Path

from evopress.artifacts.paths import Run
from evopress.cli.output import require_free

_FORMS = ("gguf", "dat")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("results", type=Path, help="folder of the run, as in results/smollm2-78mb")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there instead of RESULTS/imatrix.FORMAT")
    parser.add_argument("--output-format", choices=_FORMS, default="gguf", help="`dat` is that of before 2025")
    parser.add_argument("--force", action="store_true", help="replace the file if it is there")


def run(arguments: argparse.Namespace) -> None:
    """Write the file, and say how it is used."""
    from evopress.export.gguf.imatrix import imatrix_of, write_imatrix  # torch: not for the list of commands

    form = arguments.output_format
    output = arguments.output or arguments.results / f"imatrix.{form}"
    require_free(output, force=arguments.force)
    imatrix = imatrix_of(Run(arguments.results))
    write_imatrix(imatrix, output, form)
    print(f"{output}: {len(imatrix.sums)} weights, {imatrix.tokens} tokens of {imatrix.text}")
    print(f"llama-quantize --imatrix {output} model-f16.gguf model.gguf IQ3_S")
