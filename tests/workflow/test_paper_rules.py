"""The paper's ready configurations through Snakemake: which jobs there are, and how files are laid over one another."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from paper_models import MODELS, families, paper_settings, write_model_config
from planning import Checkout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return Checkout.make(tmp_path_factory.mktemp("paper") / "evopress")


@pytest.mark.parametrize("name", MODELS)
def test_all_families_of_a_model_are_one_run(checkout: Checkout, name: str, tmp_path: Path) -> None:
    settings = paper_settings(name, write_model_config(tmp_path / "model", name))
    jobs = Counter(job.split()[0] for job in checkout.plan(settings))
    searches = len(settings["searches"])
    assert searches == 3 + 9 + 8
    assert jobs["search"] == jobs["export"] == jobs["perplexity"] == jobs["tasks"] == searches
    assert jobs["variants"] == 4 and jobs["variants_modules"] == 2 and jobs["tokens"] == 5
    assert jobs["hessians"] == 1 and jobs["hessian_sum"] == 1  # of each block, for all families


def test_files_on_the_command_line_lie_over_one_another(checkout: Checkout, tmp_path: Path) -> None:
    folder = write_model_config(tmp_path / "model", "mistral-7b-v0.3")
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({"model": {"source": "folder", "path": str(folder)}, "searches": {"q3-dp": None}}))
    quantization, _, depth = families("mistral-7b-v0.3")
    model = quantization.with_name("mistral-7b-v0.3.yaml")
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--cores", "1", "--configfile"]
    outcome = subprocess.run(
        [*command, *map(str, (model, quantization, depth, mine)), "--config", "name=elsewhere"],
        cwd=checkout.root,
        env=os.environ | {"PYTHONPATH": str(checkout.root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert outcome.returncode == 0, outcome.stderr
    table = [line.split() for line in (outcome.stdout + outcome.stderr).splitlines()]
    counts = {words[0]: int(words[1]) for words in table if len(words) == 2 and words[1].isdigit()}
    assert counts["search"] == 2 + 8 and counts["variants"] == 32 and counts["hessian_sum"] == 32
    assert "results/elsewhere" in outcome.stdout + outcome.stderr
