"""Tensors by name from single, sharded and damaged checkpoints."""

import json
import struct
from pathlib import Path

import pytest
import torch
from architectures import build
from safetensors.torch import save_file

from evopress.models.checkpoint import INDEX, SINGLE, Checkpoint
from evopress.util.errors import ModelError


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    build("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    return tmp_path


def test_single_and_sharded_hold_the_same(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    single = tmp_path_factory.mktemp("single")
    build("llama").save_pretrained(single)
    one, many = Checkpoint(single), Checkpoint(sharded)
    assert one.files == [single / SINGLE]
    assert len(many.files) > 3
    assert one.names() == many.names() == sorted(build("llama").state_dict())
    first, second = one.read(one.names()), many.read(many.names())
    for name, tensor in build("llama").state_dict().items():
        assert torch.equal(first[name], tensor) and torch.equal(second[name], tensor)
    assert one.sizes() == many.sizes() == {name: t.nbytes for name, t in sorted(first.items())}


def test_dtype_converts_floating_point_only(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.int64)}, tmp_path / SINGLE)
    tensors = Checkpoint(tmp_path).read(["a", "b"], dtype=torch.bfloat16)
    assert (tensors["a"].dtype, tensors["b"].dtype) == (torch.bfloat16, torch.int64)
    assert Checkpoint(tmp_path).floating_dtype() == torch.float32


def test_names_resolve_through_a_leading_prefix_only_if_unique(tmp_path: Path) -> None:
    save_file(
        {
            "decoder.layers.0.fc1.weight": torch.ones(1),
            "language_model.model.norm.weight": torch.ones(1),
            "x.head.weight": torch.ones(1),
            "y.head.weight": torch.ones(1),
        },
        tmp_path / SINGLE,
    )
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.stored_name("model.decoder.layers.0.fc1.weight") == "decoder.layers.0.fc1.weight"
    assert checkpoint.stored_name("model.norm.weight") == "language_model.model.norm.weight"
    assert checkpoint.stored_name("head.weight") is None, "two candidates"
    assert checkpoint.stored_name("model.decoder.layers.10.fc1.weight") is None
    assert set(checkpoint.read(["model.norm.weight"])) == {"model.norm.weight"}


def test_missing_tensor_is_named(sharded: Path) -> None:
    with pytest.raises(ModelError, match=r"no tensor 'model\.layers\.9\.mlp\.up_proj\.weight'"):
        Checkpoint(sharded).read(["model.layers.9.mlp.up_proj.weight"])


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=r"pickled \(pytorch_model\.bin\).*convert them to safetensors"):
        Checkpoint(tmp_path)


def test_truncated_file_is_named(sharded: Path) -> None:
    shard = Checkpoint(sharded).files[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ModelError, match=rf"{shard.name}: damaged or cut short"):
        Checkpoint(sharded)


def test_lost_shard_is_named(sharded: Path) -> None:
    shard = Checkpoint(sharded).files[1]
    shard.unlink()
    with pytest.raises(ModelError, match=rf"{shard.name}: missing"):
        Checkpoint(sharded)


def test_link_to_weights_that_are_gone(tmp_path: Path) -> None:
    (tmp_path / SINGLE).symlink_to("/no/such/model.safetensors")
    with pytest.raises(ModelError, match=r"links to /no/such/model\.safetensors, which is gone"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 1 << 60),  # a header of an exabyte
        struct.pack("<Q", 90)
        + b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'.ljust(90),
        struct.pack("<Q", 2) + b"[]",
    ],
)
def test_lying_headers_end_in_an_error(header: bytes, tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(header + b"\0" * 64)
    with pytest.raises(ModelError, match=r"model\.safetensors: damaged"):
        Checkpoint(tmp_path)


def test_index_that_points_outside_is_refused(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match="outside the folder"):
        Checkpoint(sharded)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": 3}}'])
def test_damaged_index_is_named(text: str, sharded: Path) -> None:
    (sharded / INDEX).write_text(text)
    with pytest.raises(ModelError, match=r"index\.json: damaged"):
        Checkpoint(sharded)


def test_index_that_promises_too_much(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["ghost.weight"] = index["weight_map"]["lm_head.weight"]
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks 'ghost\.weight'"):
        Checkpoint(sharded)
