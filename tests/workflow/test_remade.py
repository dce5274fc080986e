"""An artifact that is cut short, or has a bit changed: the job that reads it names it and sets it aside, Snakemake
plans to make it again, and the end is the same as if it had never been damaged. A changed bit in a large tensor is
found by `evopress verify`, or by the export that the tensor goes into.
"""

import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_run import TARGETS, Run, fault_settings

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform != "linux", reason="the zygote needs Linux"),
]
# What is damaged, the job that reads it, the job that made it, and whether to run what Snakemake plans then.
CASES = [
    ("model.json", "tokens search", "model", False),
    ("model/config.json", "hessians 0", "model", False),
    ("model/tokenizer.json", "tasks_dense", "model", False),
    ("model/model.safetensors", "perplexity_dense", "model", False),
    ("layers.parquet", "variants gptq 001", "model", False),
    ("tokens/calibration.parquet", "hessians 1", "tokens calibration", False),
    ("hessians/shard_0/block_001.safetensors", "hessian_sum 001", "hessians 0", False),
    ("hessians/shard_1/block_001.json", "hessian_sum 001", "hessians 1", False),
    ("hessians/block_001.safetensors", "variants gptq 001", "hessian_sum 001", False),
    ("variants/gptq/block_001.safetensors", "search evo", "variants gptq 001", True),
    ("variants/gptq/block_002.parquet", "search evo", "variants gptq 002", False),
    (
        "variants/chain/chain/block_000.safetensors",
        "variants_sequential chain 001",
        "variants_sequential chain 000",
        False,
    ),
    ("search/evo/configuration.parquet", "export evo huggingface", "search evo", False),
    ("search/evo/trace.parquet", "report", "search evo", False),
    ("search/even/polished/block_001.safetensors", "export even huggingface", "polish even", True),
    ("search/even/polished/block_002.parquet", "export even archive", "polish even", False),
    ("exports/evo/huggingface/model.safetensors", "perplexity evo", "export evo huggingface", True),
    ("exports/evo/huggingface.json", "card evo huggingface", "export evo huggingface", False),
    ("evaluation/dense/hidden_held.safetensors", "perplexity evo", "perplexity_dense", False),
    ("evaluation/evo/perplexity.parquet", "card evo huggingface", "perplexity evo", True),
    ("evaluation/even/tasks.parquet", "report", "tasks even", False),
]


def damage(path: Path, dice: random.Random, ways: Sequence[str]) -> str:
    """Change a bit, cut the end off or blank a part; a linked file becomes one of our own, so that its source stays."""
    content = bytearray(path.read_bytes())
    how = dice.choice(ways)
    if how == "bit":
        place = dice.randrange(len(content))
        content[place] ^= 1 << dice.randrange(8)
        if path.suffix == ".json" and content[place : place + 1].isspace():
            content[place] = ord("#")  # blanks in JSON may change freely
    elif how == "cut":
        del content[dice.randrange(len(content)) :]
    else:
        start = dice.randrange(len(content) - 8)
        content[start : start + 4096] = b"\x01" * len(content[start : start + 4096])
    path.unlink()
    path.write_bytes(content)
    return how


@pytest.mark.parametrize(("path", "reader", "maker", "rerun"), CASES, ids=[case[0] for case in CASES])
def test_what_is_damaged_is_named_and_made_again(
    whole: Run,
    settings: dict[str, Any],
    dice: random.Random,
    tmp_path: Path,
    path: str,
    reader: str,
    maker: str,
    rerun: bool,
) -> None:
    run = whole.copy(tmp_path / "evopress")
    how = damage(run.results / path, dice, ["cut"] if path.endswith(".safetensors") else ["bit", "cut", "blank"])
    found = run.contents()
    ended = run.start(run.job(reader))
    assert ended.code == 1, how
    assert f"results/tiny/{path}" in ended.output or path.startswith("model/"), ended.output
    assert "damaged (" in ended.output and "run again to remake it" in ended.output and "Traceback" not in ended.output
    after = run.contents()
    untouched = {name for name in after if not name.endswith(".damaged")} - set(run.job(reader).outputs)
    assert all(after[name] == found[name] for name in untouched)
    assert any(name.endswith(".damaged") for name in after), how
    for target in ("report.html", "exports/evo/archive.json", "exports/even/archive.json"):
        (run.results / target).unlink(missing_ok=True)  # where a job failed, the next run makes its targets anyway
    if reader.startswith("hessian_sum"):  # it runs before there are variants
        (run.results / "variants/gptq/block_001.parquet").unlink()
    jobs = run.checkout.jobs(fault_settings(settings), targets=TARGETS)
    assert {maker, reader} <= {job.name for job in jobs}
    if rerun:
        for job in jobs:
            ended = run.start(job)
            assert ended.code == 0, f"{job.name}: {ended.output}"
        now = {name: content for name, content in run.contents().items() if not name.endswith(".damaged")}
        assert now == whole.contents()


def verify(run: Run) -> "subprocess.CompletedProcess[str]":
    """What `evopress verify` says of a run."""
    command = [sys.executable, "-m", "evopress", "verify", "results/tiny"]
    return subprocess.run(command, cwd=run.checkout.root, capture_output=True, text=True, check=False)


def test_verify_names_all_that_is_damaged_or_missing(whole: Run, dice: random.Random, tmp_path: Path) -> None:
    run = whole.copy(tmp_path / "evopress")
    good = verify(run)
    assert good.returncode == 0 and "artifacts are as they were written" in good.stdout, good.stdout + good.stderr
    paths = [case[0] for case in CASES if not case[0].startswith("model/")] + [
        "exports/evo/archive/archive.safetensors"
    ]
    seals = {"hessians/shard_1/block_001.json", "exports/evo/huggingface.json"}  # what these seal is named by them
    for path in paths:
        damage(run.results / path, dice, ["bit", "cut", "blank"])
    lost = [
        "hessians/shard_0/block_000.safetensors",
        "variants/gptq/block_000.parquet",
        "exports/even/huggingface/config.json",
    ]
    for path in lost:
        (run.results / path).unlink()
    bad = verify(run)
    assert bad.returncode == 1 and "artifacts are damaged or missing" in bad.stderr
    unnamed = [path for path in [*paths, *lost] if f"results/tiny/{path}: " not in bad.stdout]
    assert set(unnamed) <= {"exports/evo/huggingface/model.safetensors"}, bad.stdout  # its manifest is damaged, too
    assert seals.isdisjoint(unnamed) and "Traceback" not in bad.stderr


@pytest.mark.parametrize(
    ("path", "reader"),
    [
        ("model/model.safetensors", "export evo huggingface"),
        ("variants/gptq/block_001.safetensors", "export evo huggingface"),
    ],
)
def test_an_export_holds_no_damaged_tensor(whole: Run, tmp_path: Path, path: str, reader: str) -> None:
    run = whole.copy(tmp_path / "evopress")
    large = run.results / path
    with safe_open(large, framework="pt") as stream:
        names, metadata = set(stream.keys()), stream.metadata()
    tensors = load_file(large)
    for name in names:
        tensors[name].view(torch.uint8).flatten()[0] ^= 1
    large.unlink()  # a linked file becomes one of our own
    save_file(tensors, large, metadata=metadata)
    ended = run.start(run.job(reader))
    assert ended.code == 1 and "from the checksum); run again to remake it" in ended.output, ended.output
    assert not list((run.results / "models").glob("evo/*.safetensors"))
