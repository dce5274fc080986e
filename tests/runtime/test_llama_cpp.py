"""Files that are written run in llama.cpp, and give there what transformers gives.

Weights in F32 leave two differences: llama.cpp keeps keys and values in 16 bits, with an error of 2^-11 of each number,
and sums in another order. Over three blocks that moves logits of standard deviation 1 by up to 0.006; a mix-up of any
part (an order of rows, a scale, a window) moves them by 0.3 and more. The bound lies between.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType
from gguf_layouts import TINY, byte_level, folder_of, packed_weights, sentencepiece, tiny, tokens

from evopress.evaluation import llama_cpp
from evopress.export.gguf.file import write_gguf
from evopress.models.gguf_tokenizer import PRETOKENIZERS

pytestmark = [
    pytest.mark.runtime,
    pytest.mark.skipif(not llama_cpp.is_installed(), reason="needs llama.cpp: pip install -e '.[runtime]'"),
]

F32, F16, Q8_0 = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0
LARGEST = 0.02
"""Difference of a logit; see above."""
MEAN_KL = 1e-3
"""Of packed weights, in nats: llama.cpp rounds what goes into such a layer to 8 bits per number, an error of 1/254 of
the largest of each 32 or 256, which these models of random weights answer with up to 6e-4."""
TEXTS = [
    "Hello world, don't you'LL we've!",
    " \n\n\t  x   y\r\n",
    "Ünïcödé 日本語 हिन्दी 한국어 עברית 1234567 3.14",
    "def f(x):\n    return x + 1\n\n\n",
    "<s>user<|chat|>hi<tool></s>",
    "😀👩‍💻",
    "",
]


def expected(model: transformers.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens()])).logits[0]


def found(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(list(llama_cpp.logits(path, [tokens()], threads=1))))


def divergence(model: torch.Tensor, runtime: torch.Tensor) -> float:
    """Mean over positions of KL(model || runtime), in nats."""
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (model, runtime))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize("name", TINY)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    write_gguf(folder_of(model, tmp_path / "model"), tmp_path / "x.gguf", {}, name="tiny", dense=F32)
    torch.testing.assert_close(found(tmp_path / "x.gguf"), expected(model), atol=LARGEST, rtol=0)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_packed_weights_run_as_they_are(name: str, kind: str, tmp_path: Path) -> None:
    model = tiny(name)
    packed = packed_weights(model, GGMLQuantizationType[kind])
    write_gguf(folder_of(model, tmp_path / "model"), tmp_path / "x.gguf", packed, name="tiny", dense=F16)
    assert divergence(expected(model), found(tmp_path / "x.gguf")) < MEAN_KL


def test_a_llama_without_some_modules_runs_as_deci(tmp_path: Path) -> None:
    model = tiny("llama-llama3")
    for layer in (model.model.layers[0].self_attn.o_proj, model.model.layers[1].self_attn.o_proj):
        layer.weight.zero_()
    model.model.layers[2].mlp.down_proj.weight.zero_()
    absent = {(0, "attn"), (1, "attn"), (2, "mlp")}
    write_gguf(folder_of(model, tmp_path / "model"), tmp_path / "x.gguf", {}, name="tiny", dense=F32, absent=absent)
    torch.testing.assert_close(found(tmp_path / "x.gguf"), expected(model), atol=LARGEST, rtol=0)


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama3", "qwen2", "sentencepiece", "sentencepiece-bare"])
def test_tokens_are_those_of_the_tokenizer(name: str, tmp_path: Path) -> None:
    if name in PRETOKENIZERS:
        kind = PRETOKENIZERS[name]
        tokenizer = byte_level(kind.make(), normalizer=kind.normalizer(), whole_words=kind.whole_words)
    else:
        tokenizer = sentencepiece(prefix=name == "sentencepiece")
    write_gguf(folder_of(tiny("llama"), tmp_path / "model", tokenizer), tmp_path / "x.gguf", {}, name="tiny")
    assert llama_cpp.tokenize(tmp_path / "x.gguf", TEXTS) == [tokenizer(text)["input_ids"] for text in TEXTS]
