"""Hessians as an imatrix: what llama.cpp's quantizer takes, what is read back, and what is refused."""

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pandas as pd
import pytest
import torch
from depth_run import write_depth_model
from finished_run import FINGERPRINT
from gguf_layouts import tiny

from evopress.artifacts.paths import Run, manifest_path
from evopress.artifacts.provenance import Provenance
from evopress.artifacts.tables import VARIANTS, read_table
from evopress.artifacts.tensors import read_tensors, write_tensors
from evopress.cli.commands import main
from evopress.compression.imatrix import diagonal_hessians, read_imatrix
from evopress.compression.methods.gguf import Gguf
from evopress.compression.stage import make_variants
from evopress.config.base import parse_section
from evopress.config.context import StageContext
from evopress.export.gguf.imatrix import Imatrix, imatrix_of, write_imatrix
from evopress.models.gguf_header import read_gguf_header
from evopress.util.errors import ConfigError

SEQUENCES, LENGTH = 4, 64


def calibrated(folder: Path, name: str = "llama", **values: int) -> Run:
    """A tiny model with Hessians of random inputs, in which some columns count far more."""
    run = Run(folder / "run")
    write_depth_model(run, tiny(name, **values))
    layers, random = pd.read_parquet(run.layers), torch.Generator().manual_seed(0)
    text = json.dumps({"calibration": {"source": "file", "path": "calm.txt"}, "hessians": {"shards": 1}})
    for block, members in layers.groupby("block"):
        groups = members.drop_duplicates("input_group")
        inputs = {
            row.input_group: torch.randn(SEQUENCES * LENGTH, row.columns, generator=random)
            * torch.rand(row.columns, generator=random).mul(3).exp()
            for row in groups.itertuples()
        }
        hessians = {group: x.t() @ x for group, x in inputs.items()}
        facts = {"tokens": SEQUENCES * LENGTH, "sequences": SEQUENCES}
        write_tensors(hessians, run.hessian(block), Provenance("hessians", text, FINGERPRINT), facts)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return calibrated(tmp_path_factory.mktemp("imatrix"))


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_the_mean_squares_of_every_layer_come_back(run: Run, tmp_path: Path, form: str) -> None:
    path = tmp_path / "imatrix"
    write_imatrix(imatrix_of(run), path, form)
    found, layers = read_imatrix(path), pd.read_parquet(run.layers)
    assert len(found) == len(layers) == 7 * 3
    parts = {"q_proj": "attn_q", "k_proj": "attn_k", "o_proj": "attn_output", "down_proj": "ffn_down"}
    assert set(parts) < set(layers["kind"])
    for row in layers.itertuples():
        if row.kind in parts:
            expected = read_tensors(run.hessian(row.block))[row.input_group].diagonal() / (SEQUENCES * LENGTH)
            name = f"blk.{row.block}.{parts[row.kind]}.weight"
            np.testing.assert_allclose(found[name], expected.numpy(), rtol=1e-6)


def test_the_file_has_the_keys_and_shapes_that_llama_cpp_asks_for(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    write_imatrix(imatrix_of(run), path)
    header = read_gguf_header(path, whole="imatrix.")
    assert header.metadata["general.type"] == "imatrix"
    assert header.metadata["imatrix.datasets"] == ["calm.txt"]
    assert (header.metadata["imatrix.chunk_count"], header.metadata["imatrix.chunk_size"]) == (SEQUENCES, LENGTH)
    sums, counts = (header.tensors[f"blk.1.ffn_up.weight.{part}"] for part in ("in_sum2", "counts"))
    assert sums.kind == counts.kind == gguf.GGMLQuantizationType.F32
    assert (sums.shape, counts.shape) == ((1, 256), (1, 1))


def test_fused_layers_and_other_architectures_have_their_names(tmp_path: Path) -> None:
    names = set(imatrix_of(calibrated(tmp_path, "phi3")).sums)
    assert {"blk.0.attn_qkv.weight", "blk.0.ffn_up.weight", "blk.2.ffn_down.weight"} <= names


def test_the_command_writes_where_it_is_asked(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "own.dat"
    command = ["export-imatrix", str(run.root), "--output", str(target), "--output-format", "dat"]
    assert main(command) == 0
    assert "21 weights, 256 tokens of calm.txt" in capsys.readouterr().out
    assert len(read_imatrix(target)) == 21
    assert main(command) == 1 and "is there already" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0


def test_hessians_that_are_gone_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = calibrated(tmp_path)
    run.hessian(2).unlink()
    manifest_path(run.hessian(2)).unlink()
    assert main(["export-imatrix", str(run.root)]) == 1
    assert "block_002.safetensors: missing; run the Hessians first, with `hessians: {keep: true}`" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_rounding_with_an_imatrix_is_that_with_the_hessians(run: Run, tmp_path: Path, form: str) -> None:
    pytest.importorskip("libgguf")
    path, context = tmp_path / "imatrix", StageContext(run)
    write_imatrix(imatrix_of(run), path, form)
    method = Gguf(types=("Q4_0", "IQ3_XXS"), rounding="rtn")
    given = method.model_copy(update={"imatrix": str(path)})
    assert method.needs_hessians and not given.needs_hessians
    make_variants(context, "own", method, [1])
    make_variants(context, "given", given, [1])
    own, other = (read_tensors(run.variant_tensors(name, 1)) for name in ("own", "given"))
    changed = [float((own[name] != other[name]).float().mean()) for name in own]
    assert own.keys() == other.keys() and max(changed) < 1e-3  # means round otherwise than sums
    tables = [read_table(run.variant_table(name, 1), VARIANTS) for name in ("own", "given")]
    assert (tables[0]["bytes"] == tables[1]["bytes"]).all()
    assert tables[1]["error"].between(1e-6, 0.5).all()


def test_importance_from_an_imatrix_matters(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("libgguf")
    imatrix, context = imatrix_of(run), StageContext(run)
    for name, sums in (
        ("own", imatrix.sums),
        ("flat", {name: np.ones_like(one) for name, one in imatrix.sums.items()}),
    ):
        path = tmp_path / f"{name}.gguf"
        write_imatrix(Imatrix(sums, imatrix.chunks, imatrix.chunk_size, "x"), path)
        make_variants(context, name, Gguf(types=("Q4_0",), rounding="rtn", imatrix=str(path)), [0])
    own, flat = (read_tensors(run.variant_tensors(name, 0)) for name in ("own", "flat"))
    assert all((own[name] != flat[name]).any() for name in own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blk.0.attn_q.weight": None}, r"belongs to another model than this one: it lacks blk\.0\.attn_q\.weight"),
        ({"blk.1.ffn_down.weight": 512}, r"it has 512 inputs for blk\.1\.ffn_down\.weight, which has 256"),
        ({"blk.0.attn_q.weight": None, "blk": 1}, r"it lacks blk\.0\.attn_q\.weight"),
        ({"blk.3.attn_q.weight": 256}, r"it has blk\.3\.attn_q\.weight, and the model 3 blocks"),
    ],
)
@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_an_imatrix_of_another_model_is_refused(
    run: Run, tmp_path: Path, form: str, change: dict[str, int | None], message: str
) -> None:
    imatrix, path = imatrix_of(run), tmp_path / "imatrix"
    sums = {**imatrix.sums, **{name: np.ones(count or 1, np.float32) for name, count in change.items()}}
    kept = {name: values for name, values in sums.items() if change.get(name, 1) is not None}
    write_imatrix(Imatrix(kept, 1, 8, "x"), path, form)
    with pytest.raises(ConfigError, match=r"^variants\.v\.imatrix: .*" + message):
        make_variants(StageContext(run), "v", Gguf(types=("Q4_0",), rounding="rtn", imatrix=str(path)), [0])


def test_damaged_files_are_refused(run: Run, tmp_path: Path) -> None:
    layers, path = pd.read_parquet(run.layers), tmp_path / "imatrix"
    whole = {}
    for form in ("gguf", "dat"):
        write_imatrix(imatrix_of(run), path, form)
        whole[form] = path.read_bytes()
    bad = [
        *(data[: len(data) // 2] for data in whole.values()),
        b"",
        struct.pack("<3i", 1, -5, 0),
        struct.pack("<2i", 1, 1) + b"a" + struct.pack("<2i", 1, 1 << 30),
        struct.pack("<2i", 1, 1) + b"a" + struct.pack("<2if", 1, 1, float("nan")),
    ]
    for data in bad:
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=r"^imatrix: .*imatrix: cannot be read .* llama-imatrix$"):
            diagonal_hessians(path, run.model, layers, 0)
    with pytest.raises(ConfigError, match=r"cannot be read .*No such file"):
        diagonal_hessians(tmp_path / "none", run.model, layers, 0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.attn_q.weight", np.ones((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match="a GGUF file, but holds no imatrix"):
        diagonal_hessians(path, run.model, layers, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"types": ["Q4_0"]}, "imatrix: `rounding: gptq` needs whole Hessians"),
        (
            {"types": ["Q4_0"], "rounding": "rtn", "propagation": "sequential", "propagation_level": "Q4_0"},
            "imatrix: `propagation: sequential` observes inputs itself",
        ),
    ],
)
def test_settings_that_an_imatrix_does_not_go_with(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_section(Gguf, {"method": "gguf", "imatrix": "x.gguf", **settings}, "variants.v")


def test_counts_of_experts_are_their_own(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_tensor("blk.0.ffn_up_exps.weight.in_sum2", np.array([[2, 4], [9, 6], [5, 5]], np.float32))
    writer.add_tensor("blk.0.ffn_up_exps.weight.counts", np.array([[2], [3], [0]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_imatrix(path)["blk.0.ffn_up_exps.weight"].tolist() == [1, 2, 3, 2, 1, 1]
