"""Peak memory while one layer is compressed at several levels, against what a job plans for it:

    python tests/benchmarks/sweep.py

Weights and Hessian are there before, and count in neither figure.
"""

import argparse
import math

import torch
from memory import peak_growth

from evopress.compression.layers import LayerShape
from evopress.compression.methods.gguf import Gguf
from evopress.compression.methods.gptq import Gptq
from evopress.compression.methods.pruning import SparseGpt


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=4096)
    arguments = parser.parse_args()
    rows, columns = arguments.rows, arguments.columns
    weight = torch.randn(rows, columns)
    inputs = torch.randn(columns * 3 // 2, columns)
    hessian = inputs.T @ inputs
    del inputs
    shape = [LayerShape("layer", 0, "layer", "layer", rows, columns, weight.itemsize)]
    for passes in (0, 2):
        methods = [
            Gptq(passes=passes, group_size=group_size, clip_search=clip_search)
            for group_size in (None, 64)
            for clip_search in (False, True)
        ]
        for method in (*methods, Gguf(passes=passes), SparseGpt(passes=passes, step=rows * columns // 20, levels=2)):
            method.compress({"layer": weight[:8]}, hessian)  # what libraries set up once is not the method's
            with peak_growth() as growth:
                method.compress({"layer": weight}, hessian)
            planned = method.peak_bytes(shape, math.inf) - weight.nbytes - hessian.nbytes
            chosen = method.model_dump(include={"group_size", "clip_search", "passes"}, exclude_unset=True)
            print(f"{method.method} {chosen}: {growth.bytes / 1e6:.0f} MB of {planned / 1e6:.0f} planned", flush=True)


if __name__ == "__main__":
    main()
