"""Seconds and peak memory of each stage of the default workflow, and tokens/s through the embedded model:

    python tests/benchmarks/stages.py

copies the project to a scratch folder, runs the whole workflow there, and prints a table. Every job notes its own wall
time (Python's start included), the seconds that all cores worked for it and its peak resident memory when it ends, so
nothing but the workflow itself runs. What cores worked hardly moves with what else the machine does.
`--configfile` lays settings over the default, as for snakemake.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from evopress.artifacts.paths import Run
from evopress.data.tokens import read_tokens
from evopress.models.blockwise import BlockwiseModel, final_hidden
from evopress.workflow.settings import load_settings

PROJECT = Path(__file__).resolve().parents[2]
PARTS = ("evopress", "scripts", "workflow", "config")

_NOTE = '''
"""Imported by every Python that starts here; scripts of the workflow note what they took when they end."""
import atexit, json, os, resource, sys, time
from pathlib import Path

def note(started=time.time()):
    script = Path(sys.argv[0])
    if script.parent.name == "scripts" and len(sys.argv) > 1:
        peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        times = os.times()
        worked = times.user + times.system + times.children_user + times.children_system
        seconds = {"seconds": time.time() - started, "worked": worked}
        fact = {"stage": sys.argv[1], **seconds, "bytes": peak * 1024}
        Path(os.environ["EVOPRESS_BENCHMARK"], f"{os.getpid()}-{started}.json").write_text(json.dumps(fact))

atexit.register(note)
'''


def main() -> None:
    """Run the workflow in a scratch folder and print what its jobs took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", default="all", help="as for snakemake")
    parser.add_argument("--configfile", type=Path, nargs="+", default=[], help="settings laid over the default")
    parser.add_argument("--folder", type=Path, help="where the scratch folder is made; kept if given")
    arguments = parser.parse_args()
    overlays = [path.resolve() for path in arguments.configfile]
    scratch = Path(tempfile.mkdtemp(prefix="evopress-stages-", dir=arguments.folder))
    try:
        copy_project(scratch)
        seconds = run_workflow(scratch, arguments.cores, overlays)
        os.chdir(scratch)
        settings = load_settings(overlays)
        run = Run(Path("results") / settings.name)
        print("\n" + table(scratch / "facts").to_string(index=False))
        print(f"\nall jobs, with Snakemake: {seconds:.0f} s on {arguments.cores} cores")
        dataset = next(iter(settings.data.evaluation))
        for threads in sorted({1, torch.get_num_threads()}):
            print(f"dense model, {threads} threads: {forward_rate(run, dataset, threads)}")
    finally:
        os.chdir(PROJECT)
        if arguments.folder is None:
            shutil.rmtree(scratch)


def copy_project(scratch: Path) -> None:
    """Copy what the workflow needs."""
    for part in PARTS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PROJECT / part, scratch / part, ignore=ignored, dirs_exist_ok=True)


def run_workflow(scratch: Path, cores: str, overlays: Sequence[Path], targets: Sequence[str] = ()) -> float:
    """Seconds that the workflow takes in ``scratch`` (for some targets only); its jobs leave their facts there."""
    for folder in ("facts", "site"):
        (scratch / folder).mkdir(exist_ok=True)
    (scratch / "site" / "sitecustomize.py").write_text(_NOTE)
    paths = [str(scratch / "site"), str(scratch), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "EVOPRESS_BENCHMARK": str(scratch / "facts"),
    }
    command = [sys.executable, "-m", "snakemake", *targets, "--cores", cores]
    if overlays:
        command += ["--configfile", *map(str, overlays)]
    start = time.perf_counter()
    subprocess.run(command, cwd=scratch, env=environment, check=True)
    return time.perf_counter() - start


def table(folder: Path) -> pd.DataFrame:
    """One row for each stage, in the order in which stages ended."""
    paths = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
    facts = pd.DataFrame([json.loads(path.read_text()) for path in paths])
    grouped = facts.groupby("stage", sort=False)
    return pd.DataFrame(
        {
            "stage": list(grouped.groups),
            "jobs": grouped.size().to_numpy(),
            "seconds": grouped["seconds"].sum().round(1).to_numpy(),
            "longest": grouped["seconds"].max().round(1).to_numpy(),
            "of all cores": grouped["worked"].sum().round(1).to_numpy(),
            "peak memory, GB": (grouped["bytes"].max() / 1e9).round(2).to_numpy(),
        }
    )


def forward_rate(run: Run, dataset: str, threads: int) -> str:
    """Tokens a second through all blocks and the head of the dense model, on an evaluation set."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = BlockwiseModel.from_folder(run.model, torch.device("cpu"), resident=False, quick=True)
        tokens = read_tokens(run, dataset)
        start = time.perf_counter()
        hidden = final_hidden(model, tokens, 8192, "forward")
        blocks = time.perf_counter() - start
        with torch.inference_mode():
            for sequence in hidden:
                model.logits(sequence[None])
        seconds = time.perf_counter() - start
    finally:
        torch.set_num_threads(before)
    return f"{tokens.numel() / seconds:.0f} tokens/s ({tokens.numel() / blocks:.0f} without the head)"


if __name__ == "__main__":
    main()
