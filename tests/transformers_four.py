"""transformers 4.57 beside the version under test: a folder of packages that another process puts first on its path.

torch, numpy and safetensors are those of the environment; only what version 4 needs in another version is installed.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

_PACKAGES = ("transformers==4.57.6", "huggingface-hub==0.36.2", "tokenizers==0.22.2")
_RUN = """
import json, sys
import torch, transformers
from pathlib import Path
from safetensors.torch import save_file
assert transformers.__version__.startswith("4.57."), transformers.__version__
folders, tokens, text, target = json.loads(sys.argv[1])
found, encoded = {}, {}
for folder in folders:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        found[folder] = model(input_ids=torch.tensor(tokens)).logits
    encoded[folder] = transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
save_file(found, target)
Path(target).with_suffix(".json").write_text(json.dumps(encoded))
"""


def packages() -> Path:
    """Folder of the packages, made once; the test is skipped where PyPI does not answer."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evopress-tests"
    folder = cache / f"{'-'.join(_PACKAGES).replace('==', '-')}-py{sys.version_info.major}{sys.version_info.minor}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=cache))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(scratch), *_PACKAGES]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"transformers 4 cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
    try:
        scratch.rename(folder)
    except OSError:  # another process was first
        assert folder.is_dir()
    return folder


def run(
    folders: Sequence[Path], tokens: torch.Tensor, text: str, scratch: Path
) -> tuple[list[torch.Tensor], list[list[int]]]:
    """What version 4 makes of each model folder: logits [sequences, tokens, vocabulary], and the tokens of a text."""
    target = scratch / "logits.safetensors"
    asked = json.dumps([list(map(str, folders)), tokens.tolist(), text, str(target)])
    environment = {**os.environ, "PYTHONPATH": str(packages()), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _RUN, asked]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    logits, encoded = load_file(target), json.loads(target.with_suffix(".json").read_text())
    return [logits[str(folder)] for folder in folders], [encoded[str(folder)] for folder in folders]
