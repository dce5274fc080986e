"""The stage that measures exported files in llama.cpp, on tiny models."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from depth_run import write_depth_configuration, write_depth_model
from finished_run import write_tokens
from gguf_layouts import byte_level, folder_of, tiny, tokens

from evopress.artifacts.paths import DENSE, Run
from evopress.artifacts.tables import RUNTIME, read_table
from evopress.config.context import ComputeSettings, StageContext
from evopress.config.evaluation import RuntimeSettings
from evopress.data.tokens import read_tokens
from evopress.evaluation import llama_cpp
from evopress.evaluation.runtime import evaluate_runtime
from evopress.export.exporters.gguf import GgufFile
from evopress.export.exporters.huggingface import HuggingFace
from evopress.export.gguf.file import write_gguf
from evopress.export.stage import run_export
from evopress.util.errors import ModelError

pytestmark = [
    pytest.mark.runtime,
    pytest.mark.skipif(not llama_cpp.is_installed(), reason="needs llama.cpp: pip install -e '.[runtime]'"),
]

BRIEF = RuntimeSettings(tokens=50, prompt=16, generated=4, repetitions=2)
MIXED = {(0, "attn"), (1, "attn"), (1, "mlp"), (2, "attn")}


def exported(folder: Path, exporter: GgufFile, dropped: Collection[tuple[int, str]] = ()) -> StageContext:
    """A run whose search has dropped modules, and exported the rest."""
    run = Run(folder / "run")
    write_depth_model(run, tiny("llama"))
    byte_level().save_pretrained(run.model)
    write_depth_configuration(run, "evo", dropped)
    write_tokens(run, "held", sequences=4, length=24)
    context = StageContext(run, ComputeSettings(device="cpu", threads=1))
    for one in (HuggingFace(), exporter):
        run_export(context, "evo", one)
    return context


def perplexity(folder: Path, ids: torch.Tensor) -> float:
    """As transformers itself has it, of windows that stand alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return float(model(ids, labels=ids).loss.exp())


def test_a_file_is_measured_beside_what_was_judged(tmp_path: Path) -> None:
    context = exported(tmp_path, GgufFile(dense="q8_0"))
    run = context.run
    write_tokens(run, "more", sequences=1, length=8, seed=1)
    evaluate_runtime(context, "evo", ["held", "more"], BRIEF)
    table = read_table(run.runtime("evo"), RUNTIME)
    assert table["dataset"].tolist() == ["held", "more"]
    assert table["tokens"].tolist() == [2 * 23, 7]  # whole sequences, at most 50 tokens of each text
    held = table.iloc[0]
    ids = read_tokens(run, "held")[:2]
    assert held["own_perplexity"] == pytest.approx(perplexity(run.export("evo", "huggingface"), ids), rel=1e-4)
    assert held["perplexity"] == pytest.approx(held["own_perplexity"], rel=0.02)
    assert 1e-8 < held["kl"] < 2e-3  # weights and activations in 8 bits; without either, see below
    file = run.export("evo", "gguf") / "evo.gguf"
    assert held["file_bytes"] == file.stat().st_size
    assert held["sha256"] == json.loads(run.export_manifest("evo", "gguf").read_text())["files"]["evo.gguf"]["sha256"]
    assert held["resident_bytes"] > 0.9 * held["file_bytes"]
    assert min(held[["prompt_speed", "generation_speed", "prompt_ratio", "generation_ratio"]]) > 0
    assert held["threads"] == 1 and "xllamacpp" in held["runtime"]
    assert [path.name for path in run.runtime("evo").parent.iterdir()] == ["runtime.parquet"]  # nothing is left behind


def test_the_dense_model_is_measured_in_f16(tmp_path: Path) -> None:
    context = exported(tmp_path, GgufFile())
    evaluate_runtime(context, DENSE, ["held"], BRIEF)
    (row,) = read_table(context.run.runtime(DENSE), RUNTIME).to_dict("records")
    assert row["kl"] < 1e-4 and row["sha256"] == ""
    assert row["prompt_ratio"] == row["generation_ratio"] == 1
    parameters = sum(parameter.numel() for parameter in tiny("llama").parameters())
    assert 2 * parameters < row["file_bytes"] < 2.2 * parameters


def test_a_model_that_lost_modules(tmp_path: Path) -> None:
    context = exported(tmp_path, GgufFile(), MIXED)
    evaluate_runtime(context, "evo", ["held"], BRIEF)
    (row,) = read_table(context.run.runtime("evo"), RUNTIME).to_dict("records")
    assert row["kl"] < 1e-4


def test_a_file_that_holds_another_model_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tiny("llama")
    other.model.layers[1].mlp.up_proj.weight.neg_()
    folder = folder_of(other, tmp_path / "other")

    def mistaken(model: Path, *arguments: Any, **options: Any) -> None:
        write_gguf(folder, *arguments, **options)

    monkeypatch.setattr("evopress.export.gguf.file.write_gguf", mistaken)
    context = exported(tmp_path, GgufFile())
    with pytest.raises(ModelError, match=r"evo\.gguf: its distribution on held .* evaluation\.runtime\.largest_kl"):
        evaluate_runtime(context, "evo", ["held"], BRIEF)
    assert not list(context.run.runtime("evo").parent.iterdir())


def test_what_is_no_model_ends_with_what_llama_cpp_says(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match=r"(?s)x\.gguf: llama\.cpp ended with exit code 1\n.*was not loaded"):
        list(llama_cpp.logits(path, [[1, 2, 3]], threads=1))


def test_sequences_stand_alone_and_long_ones_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(folder_of(tiny("llama"), tmp_path / "model"), path, {}, name="tiny")
    long = (tokens() * 30)[: llama_cpp.AT_ONCE + 7]
    pieces = list(llama_cpp.logits(path, [tokens(), long, tokens()], threads=1))
    assert [len(piece) for piece in pieces] == [24, llama_cpp.AT_ONCE, 7, 24]
    np.testing.assert_allclose(pieces[0], pieces[3], atol=1e-6)
    (whole,) = llama_cpp.logits(path, [long[:40]], threads=1)
    np.testing.assert_allclose(pieces[1][:40], whole, atol=1e-2)  # keys and values are F16


def test_memory_counts_weights_that_no_token_has_touched(tmp_path: Path) -> None:
    model = tiny("llama", vocab_size=1 << 16)  # an embedding of 67 MB, of which one row a token is read
    path = tmp_path / "x.gguf"
    write_gguf(folder_of(model, tmp_path / "model"), path, {}, name="tiny")
    size = path.stat().st_size
    assert size < llama_cpp.resident_bytes(path, tokens(), generated=2, threads=1) < size + 100e6
