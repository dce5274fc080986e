"""Time and disk of the whole variants stage, Hessians included, against the published implementation:

    python tests/benchmarks/variants.py

copies the project to a scratch folder and runs the workflow's own jobs there on the embedded model (210 layers) in
float32, calibrated on 16,384 tokens in sequences of 512: GPTQ at 2 to 6 bits in groups of 64, and SparseGPT at 50 % in
17 levels that are 10,000 weights apart. Model and tokens are made beforehand; Hessians are made anew for each method.
`--methods`, `--tokens`, `--dtype` and `--configfile` (settings laid over the default) try other cases.
"""

import argparse
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import yaml
from stages import PROJECT, copy_project, run_workflow, table

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import VARIANTS, read_table
from evopress.models.config_file import count_blocks
from evopress.workflow.settings import load_settings


class Published(NamedTuple):
    """What the published implementation takes on a machine of this kind."""

    seconds: float
    bytes: float


METHODS = {
    "gptq": ({"method": "gptq", "bits": [2, 3, 4, 5, 6], "group_size": 64, "passes": 0}, Published(239, 2.0e9)),
    "sparsegpt": (
        {"method": "sparsegpt", "sparsity": 0.5, "step": 10_000, "levels": 8, "passes": 0},
        Published(529, 6.6e9),
    ),
}
WHOLE = {"float32": 4, "bfloat16": 2}


def main() -> None:
    """Run the stage in a scratch folder, method by method, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--tokens", type=int, default=16_384, help="calibration tokens")
    parser.add_argument("--dtype", default="float32", choices=["source", *WHOLE], help="as model.dtype")
    parser.add_argument("--cores", default="all", help="as for snakemake")
    parser.add_argument("--configfile", type=Path, nargs="+", default=[], help="settings laid over the default")
    parser.add_argument("--keep", type=Path, help="folder to run in, which is kept")
    arguments = parser.parse_args()
    scratch = (arguments.keep or Path(tempfile.mkdtemp(prefix="evopress-variants-"))).resolve()
    overlays = [*(path.resolve() for path in arguments.configfile), scratch / "case.yaml"]
    try:
        copy_project(scratch)
        overlays[-1].write_text(yaml.safe_dump(case(arguments.tokens, arguments.dtype)))
        os.chdir(scratch)
        settings = load_settings(overlays)
        run, blocks = Run(Path("results") / settings.name), count_blocks(settings.model)
        run_workflow(scratch, arguments.cores, overlays, [str(run.tokens("calibration"))])
        for method in arguments.methods:
            shutil.rmtree(scratch / "facts")
            shutil.rmtree(run.hessian(0).parent, ignore_errors=True)
            targets = [str(run.variant_table(method, block)) for block in range(blocks)]
            seconds = run_workflow(scratch, arguments.cores, overlays, targets)
            print(report(run, method, blocks, seconds, table(scratch / "facts")))
    finally:
        os.chdir(PROJECT)
        if arguments.keep is None:
            shutil.rmtree(scratch)


def case(tokens: int, dtype: str) -> dict[str, object]:
    """Settings of the benchmark: all methods, and no search."""
    return {
        "name": "variants",
        "model": {"dtype": dtype},
        "data": {"calibration": {"tokens": tokens, "sequence_length": 512}},
        "variants": {name: settings for name, (settings, _) in METHODS.items()},
        "searches": {"uniform": None, "evopress": None},
    }


def report(run: Run, method: str, blocks: int, seconds: float, stages: pd.DataFrame) -> str:
    """What a method took and wrote."""
    published = METHODS[method][1]
    made = pd.concat([read_table(run.variant_table(method, block), VARIANTS) for block in range(blocks)])
    sweeps = sum(map(sweep_seconds, (run.root / "logs" / "variants" / method).glob("block_*.log")))
    on_disk = sum(run.variant_tensors(method, block).stat().st_size for block in range(blocks))
    lines = [
        f"\n{method}: {made['name'].nunique()} layers, {len(made)} variants",
        stages.to_string(index=False),
        f"whole stage, with Snakemake: {against(seconds, published.seconds, 's')}",
        f"compression itself (factor, sweep, packing), summed over jobs: {against(sweeps, published.seconds, 's')}",
        f"disk: {against(on_disk / 1e9, published.bytes / 1e9, 'GB')}",
        *(
            f"  weights stored whole in {dtype}: {made['parameters'].sum() * size / 1e9:.2f} GB, "
            f"{made['parameters'].sum() * size / on_disk:.2f} times"
            for dtype, size in WHOLE.items()
        ),
    ]
    return "\n".join(lines)


def sweep_seconds(log: Path) -> float:
    """Seconds that a job spent compressing its blocks, as its log tells."""
    return sum(map(float, re.findall(r"compressed in ([\d.]+) s", log.read_text(encoding="utf-8"))))


def against(reached: float, published: float, unit: str) -> str:
    """A value beside the published one."""
    return f"{reached:.2f} {unit}; published, for 210 layers: {published:g} {unit}, {published / reached:.2f} times"


if __name__ == "__main__":
    main()
