"""llama.cpp's quantizer as a peer: the types that it takes, its files read back, and the study on a tiny model."""

import json
import re
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pandas as pd
import pytest
import torch
from depth_run import write_depth_model
from finished_run import FINGERPRINT
from gguf_layouts import byte_level, tiny

from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import Provenance
from evopress.artifacts.tables import LLAMA_CPP, PEERS, TOKENS, read_table, write_table
from evopress.artifacts.tensors import write_tensors
from evopress.compression.formats.gguf import GgufFormat
from evopress.compression.gguf_types import GGUF_TYPES
from evopress.compression.methods.gguf import Gguf
from evopress.compression.stage import make_variants
from evopress.config.context import ComputeSettings, StageContext
from evopress.evaluation.perplexity import evaluate_perplexity
from evopress.export.exporters.gguf import GgufFile
from evopress.export.gguf.imatrix import Imatrix, write_imatrix
from evopress.models.checkpoint import Checkpoint
from evopress.models.dequantize import dequantize
from evopress.models.gguf_header import read_gguf_header
from evopress.models.gguf_weights import stored_names
from evopress.search.run import open_problem
from evopress.search.strategies.dp import DynamicProgramming
from evopress.util.errors import ConfigError, ModelError
from studies.paths import dense_gguf_path, imatrix_path, peer_file_path, peer_path, peers_path, rival_path, text_path
from studies.peers import compare_peers, measure_peer, peers_findings, quantize_peer, write_sources
from studies.plots import peers_figure
from studies.quantizer import Quantizer, types_of
from studies.recipes import BASES, Sizes, tensor_types
from studies.rivals import at_size, search_rival
from studies.settings import PeerSettings, find_program


def program() -> Path | None:
    try:
        return find_program(None)
    except ConfigError:
        return None


with_program = pytest.mark.skipif(program() is None, reason="needs llama-quantize: pip install -e '.[peers]'")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A tiny model whose rows are blocks of K types."""
    return prepare(tmp_path_factory.mktemp("peers"))


def prepare(folder: Path, **sizes: int) -> Run:
    """A tiny model, calibrated, with text to measure it on, and what the quantizer reads."""
    run = Run(folder / "run")
    write_depth_model(run, tiny("llama-tied", **sizes))
    byte_level().save_pretrained(run.model)
    random = torch.Generator().manual_seed(0)
    layers = pd.read_parquet(run.layers)
    for block, members in layers.groupby("block"):
        hessians = {}
        for row in members.drop_duplicates("input_group").itertuples():
            inputs = torch.randn(512, row.columns, generator=random) * torch.rand(row.columns, generator=random).exp()
            hessians[row.input_group] = inputs.t() @ inputs
        made_by = Provenance("hessians", '{"calibration": {"source": "file", "path": "t.txt"}}', FINGERPRINT)
        write_tensors(hessians, run.hessian(int(block)), made_by, {"tokens": 512, "sequences": 8})
    for dataset in ("search", "held"):
        tokens = torch.randint(3, 300, (4, 16), generator=random)
        frame = pd.DataFrame({"sequence": range(4), "documents": [["t"]] * 4, "tokens": tokens.int().tolist()})
        made_by = Provenance("tokens", '{"source": "file"}', FINGERPRINT)
        write_table(frame.assign(starts=[[]] * 4), run.tokens(dataset), TOKENS, made_by)
    context = StageContext(run, ComputeSettings(device="cpu"))
    evaluate_perplexity(context, "dense", ["held"])
    write_sources(context)
    return run


@pytest.fixture(scope="module")
def context(run: Run) -> StageContext:
    return StageContext(run, ComputeSettings(device="cpu", threads=1), key="k")


def columns(hidden: int, intermediate: int, blocks: int, *, tied: bool = True) -> dict[str, int]:
    parts = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up"), hidden)
    found = {f"blk.{block}.{part}.weight": hidden for block in range(blocks) for part in parts}
    found |= {f"blk.{block}.ffn_down.weight": intermediate for block in range(blocks)}
    return {"token_embd.weight": hidden, **({} if tied else {"output.weight": hidden}), **found}


def test_types_of_a_model_with_whole_super_blocks() -> None:
    """As llama.cpp prints them for Llama-2-7B."""
    types = tensor_types("Q3_K_M", columns(4096, 11008, 32, tied=False), Sizes(32, 1))
    assert types["output.weight"] == "Q6_K" and types["token_embd.weight"] == "Q3_K"
    assert [types[f"blk.{block}.attn_v.weight"] for block in (0, 1, 2, 31)] == ["Q5_K", "Q5_K", "Q4_K", "Q4_K"]
    assert [types[f"blk.{block}.ffn_down.weight"] for block in (0, 1, 2, 31)] == ["Q5_K", "Q5_K", "Q4_K", "Q4_K"]
    assert types["blk.5.attn_output.weight"] == "Q4_K" and types["blk.5.attn_q.weight"] == "Q3_K"
    more = tensor_types("Q4_K_M", columns(4096, 11008, 32), Sizes(32, 1))
    sixes = [block for block in range(32) if more[f"blk.{block}.ffn_down.weight"] == "Q6_K"]
    assert sixes == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert more["blk.4.ffn_up.weight"] == "Q4_K" and more["token_embd.weight"] == "Q6_K"


def test_types_where_rows_are_no_super_blocks() -> None:
    """Rows of 576 weights, as in SmolLM2-135M: every type has one that is taken for it."""
    sizes, found = Sizes(30, 3), columns(576, 1536, 30)
    expected = {
        "IQ2_XS": ("IQ4_NL", "IQ4_NL", "Q2_K", "IQ2_XS"),
        "IQ3_XXS": ("IQ4_NL", "IQ4_NL", "IQ3_XXS", "IQ3_XXS"),
        "Q3_K_M": ("IQ4_NL", "Q5_1", "Q5_K", "Q4_K"),
        "Q4_K_M": ("Q5_0", "Q8_0", "Q6_K", "Q6_K"),
        "Q4_0": ("Q4_0", "Q4_0", "Q4_1", "Q4_0"),
    }
    for mixture, (queries, values, first, last) in expected.items():
        types = tensor_types(mixture, found, sizes)
        assert types["token_embd.weight"] == "Q8_0", mixture
        assert types["blk.0.attn_q.weight"] == queries, mixture
        assert types["blk.0.attn_v.weight"] == values, mixture
        assert types["blk.0.ffn_down.weight"] == first and types["blk.29.ffn_down.weight"] == last, mixture
    assert tensor_types("Q4_0", {"blk.0.ffn_down.weight": 48}, sizes) == {"blk.0.ffn_down.weight": "F16"}


def test_grouped_queries_give_values_more_bits() -> None:
    for mixture, kind in (("IQ3_S", "Q4_K"), ("IQ4_XS", "Q5_K"), ("IQ2_S", "Q4_K"), ("Q2_K", "Q4_K")):
        assert tensor_types(mixture, columns(4096, 14336, 32), Sizes(32, 4))["blk.9.attn_v.weight"] == kind


@with_program
@pytest.mark.parametrize("mixture", BASES)
def test_a_file_of_every_mixture_has_the_types_and_comes_back(run: Run, context: StageContext, mixture: str) -> None:
    peer = PeerSettings(type=mixture)
    quantize_peer(context, peer)
    path = peer_file_path(run, peer.name)
    header, wanted = read_gguf_header(path), types_of(dense_gguf_path(run), mixture)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert {name: tensors[name].tensor_type.name for name in wanted} == wanted
    assert header.metadata["quantize.imatrix.entries_count"] == 7 * 3
    dequantize(path, folder := path.with_suffix(""), torch.float32)
    back, dense = Checkpoint(folder), Checkpoint(run.model)
    names = stored_names(list(back.elements()), "llama", 3)
    for name, key in names.items():
        tensor = tensors[key]
        oracle = gguf.dequantize(tensor.data, tensor.tensor_type)
        if tensor.tensor_type.name in GGUF_TYPES:
            form, shape = GgufFormat(GGUF_TYPES[tensor.tensor_type.name]), (len(oracle), oracle.shape[1])
            own = form.decode({"blocks": torch.from_numpy(np.array(tensor.data))}, shape, torch.float32)
            np.testing.assert_array_equal(own.numpy(), oracle)
        found = back.read([name])[name]
        if "attn_q" in key or "attn_k" in key:
            heads = {"attn_q": 4, "attn_k": 2}[key.split(".")[2]]
            oracle = oracle.reshape(heads, -1, 2, 256).swapaxes(1, 2).reshape(oracle.shape)
        np.testing.assert_array_equal(found.numpy(), oracle.reshape(found.shape))
        if found.ndim == 2:
            original = dense.read([name])[name]
            error = float((found - original).square().sum() / original.square().sum())
            bits = int(re.search(r"\d", tensor.tensor_type.name)[0])
            assert error < 4.0 ** (1 - bits), (key, tensor.tensor_type.name)


@with_program
def test_short_rows_have_the_types_that_llama_cpp_takes_for_them(tmp_path: Path) -> None:
    run, peer = prepare(tmp_path, hidden_size=64, intermediate_size=48), PeerSettings(type="Q4_K_M")
    quantize_peer(StageContext(run), peer)
    tensors = gguf.GGUFReader(peer_file_path(run, peer.name)).tensors
    kinds = {tensor.name: tensor.tensor_type.name for tensor in tensors}
    assert kinds["token_embd.weight"] == "Q8_0"
    assert [kinds[f"blk.{block}.attn_v.weight"] for block in range(3)] == ["Q5_0", "Q5_0", "Q8_0"]
    assert kinds["blk.0.attn_q.weight"] == "Q5_0" and kinds["blk.0.ffn_down.weight"] == "F16"


@with_program
def test_the_embedding_is_at_the_type_that_is_asked_for(run: Run, context: StageContext) -> None:
    peer = PeerSettings(type="Q3_K_S", embedding="Q4_0")
    assert peer.name == "Q3_K_S-Q4_0"
    quantize_peer(context, peer)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(peer_file_path(run, peer.name)).tensors}
    assert kinds["token_embd.weight"] == "Q4_0" and kinds["blk.0.attn_q.weight"] == "Q3_K"


@with_program
def test_importances_reach_the_quantizer(run: Run, tmp_path: Path) -> None:
    """Inputs that count a thousand times more are rounded with less error than with even importances."""
    counts = np.where(np.arange(256) % 8 == 0, 1000, 1).astype(np.float32)
    names = {name for name in types_of(dense_gguf_path(run), "Q4_0") if name.startswith("blk.")}
    dense, errors = gguf.GGUFReader(dense_gguf_path(run)), []
    original = next(tensor.data for tensor in dense.tensors if tensor.name == "blk.1.ffn_up.weight")
    for sums in (counts, np.ones(256, np.float32)):
        path = tmp_path / "imatrix.gguf"
        write_imatrix(Imatrix(dict.fromkeys(names, sums), 1, 1, "x"), path.with_suffix(".dat"), "dat")
        Quantizer(find_program(None)).quantize(dense_gguf_path(run), tmp_path / "x.gguf", "Q4_0", None, path, 1)
        tensor = next(one for one in gguf.GGUFReader(tmp_path / "x.gguf").tensors if one.name == "blk.1.ffn_up.weight")
        found = gguf.dequantize(tensor.data, tensor.tensor_type)
        errors.append(float((counts * np.square(found - original)).sum()))
    assert errors[0] < 0.8 * errors[1]


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_programs_that_are_none_are_named(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"quantizer: '/none' is no program; check the path"):
        find_program("/none")
    with pytest.raises(ConfigError, match=r"quantizer: .*other is no llama-quantize; pip install -e '\.\[peers\]'"):
        _ = Quantizer(script(tmp_path / "other", "echo hello")).takes_rules
    monkeypatch.setattr("studies.settings.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"there is no llama-quantize; pip install -e '\.\[peers\]'"):
        find_program(None)


def test_another_program_is_given_the_type_of_the_embedding_alone(run: Run, tmp_path: Path) -> None:
    """llama.cpp's own: it takes its types itself, and reads imatrix files in GGUF."""
    told = tmp_path / "told"
    own = script(
        tmp_path / "llama-quantize",
        f'if [ "$1" = --help ]; then echo "[--token-embedding-type] [--tensor-type]"; exit; fi\n'
        f'echo "$@" > {told}; for last; do before=$third; third=$second; second=$first; first=$last; done\n'
        f"echo made > $third",
    )
    target = tmp_path / "x.gguf"
    Quantizer(own).quantize(dense_gguf_path(run), target, "Q4_K_M", "Q6_K", imatrix_path(run), 3)
    words = told.read_text().split()
    assert words[:4] == ["--imatrix", str(imatrix_path(run)), "--token-embedding-type", "q6_K"]
    assert words[4] == str(dense_gguf_path(run)) and words[6:] == ["Q4_K_M", "3"]
    assert target.read_text() == "made\n"
    broken = script(
        tmp_path / "broken",
        'if [ "$1" = --help ]; then echo --token-embedding-type; exit; fi; echo main: failed; exit 1',
    )
    with pytest.raises(ModelError, match=r"broken cannot make Q2_K of .*dense\.gguf: main: failed"):
        Quantizer(broken).quantize(dense_gguf_path(run), tmp_path / "y.gguf", "Q2_K", None, imatrix_path(run), 1)
    assert not (tmp_path / "y.gguf").exists()


SEARCH = DynamicProgramming(variants="v", target=4)


@pytest.fixture(scope="module")
def measured(run: Run, context: StageContext) -> list[str]:
    """Two files and searches at their sizes."""
    peers = [PeerSettings(type="Q4_K_S"), PeerSettings(type="Q4_K_S", embedding="Q4_0"), PeerSettings(type="Q2_K")]
    method = Gguf(types=("Q2_K", "Q4_K", "Q6_K"), embedding=False)
    for block in range(3):
        make_variants(context, "v", method, [block])
    for peer in peers:
        quantize_peer(context, peer)
        measure_peer(context, peer, ["held"])
        search_rival(context, peer, "dp", SEARCH, GgufFile(dense="q8_0"), ["held"])
    names = [peer.name for peer in peers]
    compare_peers(context, names, "dp")
    return names


@with_program
def test_the_study_compares_files_of_equal_size(run: Run, context: StageContext, measured: list[str]) -> None:
    table = read_table(peers_path(run), PEERS)
    theirs = table[table["maker"] == LLAMA_CPP].set_index("peer")
    assert set(theirs.index) == set(measured)
    for name, row in theirs.iterrows():
        assert row["bytes"] == peer_file_path(run, name).stat().st_size
    assert theirs.loc["Q4_K_S", "kl"] < theirs.loc["Q4_K_S-Q4_0", "kl"] < theirs.loc["Q2_K", "kl"]
    assert theirs["embedding"].to_dict() == {"Q4_K_S": "Q6_K", "Q4_K_S-Q4_0": "Q4_0", "Q2_K": "Q6_K"}
    ours = table[table["maker"] == "dp"].set_index("peer")
    assert set(ours.index) == set(measured)
    for name, row in ours.iterrows():
        assert 0.9 * theirs.loc[name, "bytes"] < row["bytes"] <= theirs.loc[name, "bytes"]
        written = run.export(f"peers-{name}", "gguf") / f"peers-{name}.gguf"
        assert row["bytes"] == written.stat().st_size
        assert not run.export(f"peers-{name}", "huggingface").exists()
    text = text_path(peers_path(run)).read_text()
    assert "comparisons, by a third or more in" in text and "Q4_K_S" in text
    assert peers_figure(table).count("<svg") == 1
    assert "no search to compare them with" in peers_findings(table[table["maker"] == LLAMA_CPP])


@with_program
def test_what_has_ended_is_not_searched_again(
    run: Run, context: StageContext, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    peer, ended = PeerSettings(type="Q4_K_S"), rival_path(run, "Q4_K_S").with_suffix(".ended")
    before, tokens, asked = ended.read_text(), run.tokens("search").read_bytes(), []
    monkeypatch.setattr("studies.rivals.run_search", lambda context, name, strategy: asked.append(name))
    monkeypatch.setattr("studies.rivals.run_export", lambda *arguments: asked.append("export") or exit_())

    def made(key: str = "k") -> list[str]:
        asked.clear()
        with pytest.raises(KeyboardInterrupt):
            search_rival(replace(context, key=key), peer, "dp", SEARCH, GgufFile(dense="q8_0"), ["held"])
        return asked

    assert made() == ["export"]
    assert made("other code") == made("") == ["peers-Q4_K_S", "export"]
    ended.write_text(before)
    run.tokens("search").write_bytes(run.tokens("held").read_bytes())
    assert made() == ["peers-Q4_K_S", "export"]
    run.tokens("search").write_bytes(tokens)
    ended.write_text(before)
    assert made() == ["export"]


def exit_() -> None:
    raise KeyboardInterrupt


@with_program
def test_files_as_large_as_the_models_own_are_left_out(
    run: Run, context: StageContext, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = peer_file_path(run, "Q4_K_S").stat().st_size
    before = run.model_manifest.read_text()
    run.model_manifest.write_text(json.dumps({**json.loads(before), "origin": {"gguf_bytes": largest}}))
    try:
        search_rival(context, PeerSettings(type="Q4_K_S"), "dp", SEARCH, GgufFile(), ["held"])
        assert read_table(rival_path(run, "Q4_K_S"), PEERS).empty
        compare_peers(context, measured)
        assert set(read_table(peers_path(run), PEERS)["peer"]) == set(measured) - {"Q4_K_S"}
    finally:
        run.model_manifest.write_text(before)


@with_program
def test_a_size_that_no_levels_meet_is_left_open(run: Run, context: StageContext, measured: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"0\.001 MB is below the smallest file"):
        open_problem(run, at_size(SEARCH, 1000, GgufFile()), "studies.peers.against: dp")
    peer = PeerSettings(type="IQ2_XS")
    for size in (1000, peer_file_path(run, "Q2_K").stat().st_size - 200_000):  # the second has no room for Q2_K
        table = read_table(peer_path(run, "Q2_K"), PEERS).assign(bytes=size)
        write_table(table, peer_path(run, peer.name), PEERS, Provenance("peers", "{}", FINGERPRINT))
        search_rival(context, peer, "dp", SEARCH, GgufFile(), ["held"])
        assert read_table(rival_path(run, peer.name), PEERS).empty
        rival_path(run, peer.name).unlink()
