"""Our rules as a module of another workflow, in a folder of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from planning import REPOSITORY, Checkout

SNAKEFILE = f"""
configfile: "config/config.yaml"

module evopress:
    snakefile: "{REPOSITORY}/workflow/Snakefile"
    config: config["compression"]

use rule * from evopress as evopress_*

rule all:
    default_target: True
    input: rules.evopress_all.input
    output: "mine.txt"
    shell: "cp results/tiny/summary.txt {{output}}"
"""


def test_another_workflow_plans_all_rules_and_runs_one(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    own = {**settings, "evaluation": {"tasks": {"names": []}}}
    (tmp_path / "config" / "config.yaml").write_text(yaml.safe_dump({"compression": own, "other": 1}))
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    planned = snakemake(tmp_path, "--dry-run")
    for rule in (
        "model",
        "tokens",
        "hessians",
        "variants",
        "search",
        "export",
        "card",
        "perplexity",
        "report",
    ):
        assert f"\nevopress_{rule}" in planned, planned
    assert "\nall " in planned
    snakemake(tmp_path, "results/tiny/layers.parquet")
    assert (tmp_path / "results" / "tiny" / "layers.parquet").exists()
    own["model"] = {**settings["model"], "dtype": "bfloat16"}
    (tmp_path / "config" / "config.yaml").write_text(yaml.safe_dump({"compression": own}))
    assert "\nevopress_model" in snakemake(tmp_path, "--dry-run"), "a changed setting is no foreign one"


@pytest.mark.skipif(not shutil.which("snakedeploy"), reason="needs snakedeploy")
def test_snakedeploy_lays_out_a_folder_that_runs_once_it_names_the_clone(tmp_path: Path) -> None:
    clone, folder = Checkout.make(tmp_path / "clone").root, tmp_path / "folder"
    shutil.copy(REPOSITORY / "LICENSE", clone)
    identity = ["-c", "user.name=x", "-c", "user.email=x"]
    for command in (["init", "-q", "-b", "main"], ["add", "."], [*identity, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *command], cwd=clone, check=True)
    deploy = ["snakedeploy", "deploy-workflow", str(clone), str(folder), "--branch", "main", "--name", "evopress"]
    subprocess.run(deploy, check=True)
    for path in (clone / "config").rglob("*.yaml"):
        assert (folder / path.relative_to(clone)).read_bytes() == path.read_bytes()
    snakefile = folder / "workflow" / "Snakefile"
    text = snakefile.read_text()
    assert text.count('"workflow/Snakefile"') == 1
    snakefile.write_text(text.replace('"workflow/Snakefile"', f'"{clone}/workflow/Snakefile"'))
    planned = snakemake(folder, "--dry-run")
    assert all(f"\n{rule} " in planned for rule in ("model", "search", "report")), planned


def snakemake(folder: Path, *arguments: str) -> str:
    """What it prints; the package is found as an installed one is."""
    command = [sys.executable, "-m", "snakemake", "--cores", "1", *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
