"""Packed weights held in host memory or mapped: the same weights, within the limit."""

from pathlib import Path

import pytest
import torch
from search_run import prepare

from evopress.compression.store import ReadAhead, VariantStore
from evopress.search.engine.weights import PackedWeights
from evopress.util.errors import ArtifactError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> VariantStore:
    return VariantStore(prepare(tmp_path_factory.mktemp("packed")), "gptq")


@pytest.mark.parametrize("room", [0, -1], ids=["held", "mapped"])
def test_weights_are_the_same_held_or_mapped(store: VariantStore, room: int) -> None:
    total = int(store.table["bytes"].sum())
    packed = PackedWeights(store, CPU, torch.float32, torch.float32, total + room)
    assert packed.bytes == (total if room == 0 else 0)
    for _ in range(2):
        for row in store.table.itertuples():
            packed.read_ahead(row.block, [(row.layer, row.level)])
            expected = store.weight(row.block, row.layer, row.level)
            assert torch.equal(packed.unpack(row.block, row.layer, row.level), expected)
    held = sum(part.nbytes for parts in (packed.held or {}).values() for part in parts.values())
    assert held == packed.bytes


def test_weights_of_wider_arithmetic_are_those_that_the_stitched_model_has(store: VariantStore) -> None:
    packed = PackedWeights(store, CPU, torch.bfloat16, torch.float32, 0)
    row = next(store.table.itertuples())
    weight = packed.unpack(row.block, row.layer, row.level)
    assert weight.dtype == torch.float32
    assert torch.equal(weight, store.weight(row.block, row.layer, row.level, dtype=torch.bfloat16).float())


def test_what_is_read_ahead_lies_where_the_tensors_are(store: VariantStore) -> None:
    path: Path = store.run.variant_tensors("gptq", 0)
    ahead, content = ReadAhead(path), path.read_bytes()
    row = next(store.table.itertuples())
    for part, tensor in store.packed(row.block, row.layer, row.level).items():
        begin, end = ahead.places[f"{row.layer}/{row.level}/{part}"]
        assert (
            content[ahead.start + begin : ahead.start + end] == tensor.contiguous().view(torch.uint8).numpy().tobytes()
        )
    with pytest.raises(ArtifactError, match="has no"):
        store.read_ahead(0, [(row.layer, "9")])
