"""Dense against sequential propagation: held-out KL of the embedded model at 3 bits everywhere, by GPTQ:

    python tests/benchmarks/propagation.py

copies the project to a scratch folder and runs the workflow there for a uniform search over each. `--bits`, and
`--configfile` with settings laid over the default, try other cases; `--keep` keeps the folder that it names.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import pandas as pd
import yaml
from stages import PROJECT, copy_project, run_workflow, table

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import PERPLEXITY, VARIANTS, read_table
from evopress.workflow.settings import load_settings

KINDS = ("dense", "compressed")


def main() -> None:
    """Run the workflow in a scratch folder and print what it measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--cores", default="all", help="as for snakemake")
    parser.add_argument("--configfile", type=Path, nargs="+", default=[], help="settings laid over the default")
    parser.add_argument("--keep", type=Path, help="folder to run in, which is kept")
    arguments = parser.parse_args()
    overlays = [path.resolve() for path in arguments.configfile]
    scratch = (arguments.keep or Path(tempfile.mkdtemp(prefix="evopress-propagation-"))).resolve()
    try:
        copy_project(scratch)
        (scratch / "comparison.yaml").write_text(yaml.safe_dump(comparison(arguments.bits)))
        overlays.append(scratch / "comparison.yaml")
        os.chdir(scratch)
        settings = load_settings(overlays)
        run = Run(Path("results") / settings.name)
        run_workflow(scratch, arguments.cores, overlays, [str(run.perplexity(kind_name(kind))) for kind in KINDS])
        print("\n" + table(scratch / "facts").to_string(index=False))
        print("\n" + measured(run, settings.model.blocks or 0).to_string(index=False))
    finally:
        os.chdir(PROJECT)
        if arguments.keep is None:
            shutil.rmtree(scratch)


def kind_name(kind: str) -> str:
    """Name of variants and search; `dense` itself is taken."""
    return f"after-{kind}"


def comparison(bits: int) -> dict[str, object]:
    """Settings: the same variants with both kinds of propagation, and nothing else."""
    gptq = {"method": "gptq", "bits": [bits], "group_size": 64}
    chain = {"propagation": "sequential", "propagation_level": str(bits)}
    return {
        "name": "propagation",
        "variants": {"gguf": None, kind_name("dense"): gptq, kind_name("compressed"): {**gptq, **chain}},
        "searches": {
            "uniform": None,
            "evopress": None,
            **{kind_name(kind): {"strategy": "uniform", "variants": kind_name(kind), "target": bits} for kind in KINDS},
        },
    }


def measured(run: Run, blocks: int) -> pd.DataFrame:
    """Held-out perplexity and KL by data set, and the mean output error as each kind of Hessian sees it."""
    rows = []
    for kind in KINDS:
        name = kind_name(kind)
        errors = pd.concat(read_table(run.variant_table(name, block), VARIANTS) for block in range(blocks))["error"]
        for row in read_table(run.perplexity(name), PERPLEXITY).to_dict("records"):
            facts = {key: row[key] for key in ("dataset", "perplexity", "kl")}
            rows.append({"propagation": kind, **facts, "mean output error": errors.mean()})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
