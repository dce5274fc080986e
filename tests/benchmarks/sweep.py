"""Peak memory of GPTQ's sweep over one layer at five bit-widths, against what a job plans for it:

    python tests/benchmarks/sweep.py

The plan: 12 bytes for each code, the Hessian's factor in float64 and float32. Weights and Hessian are there before.
"""

import argparse

import torch
from memory import peak_growth

from evopress.compression.gptq import gptq

BITS = (2, 3, 4, 5, 6)


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=4096)
    arguments = parser.parse_args()
    weight = torch.randn(arguments.rows, arguments.columns)
    inputs = torch.randn(arguments.columns * 3 // 2, arguments.columns)
    hessian = inputs.T @ inputs
    del inputs
    columns = arguments.columns
    factor, panel = (4 + 4 + 8) * columns**2, 12 * len(BITS) * weight.numel()
    planned = max(factor, panel + factor / 4)
    gptq(weight[:8], hessian, BITS)  # what libraries set up once is not the sweep's
    for group_size in (None, 64):
        for clip_search in (False, True):
            with peak_growth() as growth:
                gptq(weight, hessian, BITS, group_size, clip_search=clip_search)
            name = f"{'per channel' if group_size is None else f'groups of {group_size}'}, clip search {clip_search}"
            print(f"{name}: {growth.bytes / 1e6:.0f} MB of {planned / 1e6:.0f} planned")


if __name__ == "__main__":
    main()
