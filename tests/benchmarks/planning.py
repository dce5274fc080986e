"""Planning a large run: seconds and peak memory of `snakemake --dry-run` and of `python -m evopress plan`.

The model is of the shape of Llama-3.1-405B, known by its config.json alone; ten searches pick from one database.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 128256,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
TEXT = {"source": "fineweb_edu", "tokens": 1 << 20, "sequence_length": 8192}


def settings(model: Path, searches: int, blocks: int) -> dict[str, Any]:
    """Searches at budgets from 2.5 bits on, over one database of GPTQ variants."""
    (model / "config.json").write_text(json.dumps(MODEL | {"num_hidden_layers": blocks}))
    found = {f"bits-{25 + 2 * number}": 2.5 + 0.2 * number for number in range(searches)}
    return {
        "complete": True,
        "name": "large",
        "model": {"source": "folder", "path": str(model)},
        "data": {"calibration": TEXT, "search": TEXT, "evaluation": {"held": TEXT}},
        "variants": {"gptq": {"method": "gptq", "bits": [2, 3, 4, 5, 6], "group_size": 128}},
        "searches": {
            name: {"strategy": "evolution", "variants": "gptq", "target": target} for name, target in found.items()
        },
    }


def measure(command: list[str], folder: Path) -> tuple[float, float, float]:
    """Wall and CPU seconds, and peak MB of the largest process."""
    environment = os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{errors[-2000:]}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6


def main() -> None:
    """Measure both commands in a copy of the project, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--searches", type=int, default=10)
    parser.add_argument("--blocks", type=int, default=126)
    parser.add_argument("--runs", type=int, default=3, help="the fastest counts")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "evopress"
        for part in ("evopress", "scripts", "workflow", "config"):
            shutil.copytree(REPOSITORY / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        model = Path(scratch) / "model"
        model.mkdir()
        (folder / "large.yaml").write_text(yaml.safe_dump(settings(model, arguments.searches, arguments.blocks)))
        commands = {
            "snakemake --dry-run": ["snakemake", "--dry-run", "--quiet", "all", "--configfile", "large.yaml"],
            "evopress plan": ["evopress", "plan", "large.yaml"],
        }
        print(f"{arguments.blocks} blocks, {arguments.searches} searches")
        for name, command in commands.items():
            results = [measure([sys.executable, "-m", *command], folder) for _ in range(arguments.runs)]
            wall, cpu, memory = min(results)
            print(f"{name:<22}{wall:6.1f} s ({cpu:.1f} s of CPU){memory:8.0f} MB")


if __name__ == "__main__":
    main()
