"""Bitmask and values: nothing is lost, nothing is wasted, nothing damaged is decoded."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evopress.compression.formats import decode
from evopress.compression.formats.bitmask import BitmaskFormat, _positions
from evopress.util.errors import ArtifactError

BITMASK = BitmaskFormat()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sparse(rows: int, columns: int, share: float, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=generator) < share
    return (torch.randn(rows, columns, generator=generator) * kept).to(dtype), kept


@given(st.integers(1, 9), st.integers(1, 19), st.floats(0, 1), st.sampled_from(DTYPES), st.integers(0, 1000))
def test_weights_return_to_the_bit(rows: int, columns: int, share: float, dtype: torch.dtype, seed: int) -> None:
    weights, kept = sparse(rows, columns, share, dtype, seed)
    parts = BITMASK.encode(weights, kept)
    found = decode("bitmask", parts, (rows, columns), dtype)
    assert found.dtype == dtype
    assert torch.equal(found, weights)
    stored = sum(part.nbytes for part in parts.values())
    assert stored == -(-rows * columns // 8) + int(kept.sum()) * dtype.itemsize
    assert BITMASK.bytes(rows * columns, int(kept.sum()), dtype.itemsize) == stored


def test_a_kept_weight_may_be_zero() -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0]])
    parts = BITMASK.encode(weights, torch.tensor([[True, True, False]]))
    assert parts["values"].tolist() == [0.0, 1.0]
    assert torch.equal(BITMASK.decode(parts, (1, 3), torch.float32), weights)


def test_half_sparsity_in_bfloat16_takes_nine_bits_a_weight() -> None:
    weights, _ = sparse(64, 64, 1.0, torch.bfloat16)
    kept = torch.arange(64 * 64).view(64, 64) % 2 == 0
    stored = sum(part.nbytes for part in BITMASK.encode(weights, kept).values())
    assert 8 * stored / weights.numel() == 9


def test_other_types_are_cast_after_storage() -> None:
    weights, kept = sparse(8, 24, 0.5, torch.bfloat16)
    found = decode("bitmask", BITMASK.encode(weights, kept), (8, 24), torch.float32)
    assert torch.equal(found, weights.float())


def test_positions_are_the_same_with_and_without_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.randint(0, 256, (37,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    by_numpy = _positions(mask, 290)
    monkeypatch.setattr("evopress.compression.formats.bitmask._HOST", "none")
    assert torch.equal(_positions(mask, 290), by_numpy)


def test_parts_that_do_not_fit_are_refused() -> None:
    weights, kept = sparse(8, 24, 0.5, torch.float32)
    parts = BITMASK.encode(weights, kept)
    with pytest.raises(ArtifactError, match="does not fit weights"):
        BITMASK.decode(parts, (8, 32), torch.float32)
    with pytest.raises(ArtifactError, match="are stored; delete"):
        BITMASK.decode({**parts, "values": parts["values"][1:]}, (8, 24), torch.float32)
