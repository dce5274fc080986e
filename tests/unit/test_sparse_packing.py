"""Bitmask with values or integers: nothing is lost, nothing is wasted, nothing damaged is decoded."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evopress.compression.formats import decode, parse
from evopress.compression.formats.bitmask import BitmaskFormat, _positions
from evopress.compression.formats.integer import IntegerFormat
from evopress.compression.formats.sparse_integer import SparseIntegerFormat
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


def integers(
    rows: int, groups: int, group: int, bits: int, share: float, seed: int = 0, dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, ...]:
    """Codes (removed ones at the zero point), kept, scales and zeros of a layer."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, groups * group), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(0, 2**bits, (rows, groups), dtype=torch.uint8, generator=generator)
    kept = torch.rand(codes.shape, generator=generator) < share
    codes = torch.where(kept, codes, zeros.repeat_interleave(group, 1))
    return codes, kept, torch.rand(rows, groups, generator=generator).to(dtype), zeros


@given(
    st.tuples(st.integers(1, 7), st.integers(1, 4), st.integers(1, 9)),
    st.integers(2, 8),
    st.floats(0, 1),
    st.sampled_from(DTYPES),
    st.integers(0, 1000),
)
def test_sparse_integers_decode_as_dense_ones_do(
    shape: tuple[int, int, int], bits: int, share: float, dtype: torch.dtype, seed: int
) -> None:
    rows, groups, group = shape
    codes, kept, scales, zeros = integers(*shape, bits, share, seed)
    form, dense = SparseIntegerFormat(bits, group), IntegerFormat(bits, group, symmetric=False)
    parts = form.encode(codes, kept, scales, zeros)
    found = decode(str(form), parts, (rows, groups * group), dtype)
    assert found.dtype == dtype
    assert torch.equal(found, dense.decode(dense.encode(codes, scales, zeros), (rows, groups * group), dtype))
    assert not found[~kept].any()
    stored = sum(part.nbytes for part in parts.values())
    assert form.bytes(rows, groups * group, int(kept.sum())) == stored


def test_half_sparsity_with_4_bits_in_groups_of_64_takes_3_31_bits_a_weight() -> None:
    form = SparseIntegerFormat(4, 64)
    assert 8 * form.bytes(64, 128, 64 * 64) / (64 * 128) == 1 + 2 + (16 + 4) / 64
    assert parse("bitmask-int4-g64") == form and str(form) == "bitmask-int4-g64"


@pytest.mark.parametrize("text", ["bitmask-int1-g64", "bitmask-int4-g0", "bitmask-int4", "bitmask-int4-g64-symmetric"])
def test_a_name_of_no_sparse_integers_is_no_format(text: str) -> None:
    with pytest.raises(ArtifactError, match="is not a format of packed weights"):
        parse(text)


@pytest.mark.parametrize(
    ("part", "changed", "message"),
    [
        ("mask", None, "a mask is missing"),
        ("mask", torch.zeros(24, dtype=torch.int8), "a mask is missing"),
        ("mask", torch.zeros(23, dtype=torch.uint8), "a mask of 23 bytes does not fit weights"),
        (
            "mask",
            torch.full((24,), 255, dtype=torch.uint8),
            r"codes of bitmask-int4-g8: \d+ of torch.uint8, expected 96",
        ),
        ("codes", None, "codes of bitmask-int4-g8: missing"),
        ("codes", torch.zeros(1000, dtype=torch.uint8), "codes of bitmask-int4-g8: 1000 of"),
        ("codes", torch.zeros(48, dtype=torch.int64), "codes of bitmask-int4-g8: 48 of torch.int64"),
        ("scales", None, "scales of int4-g8: missing"),
        ("scales", torch.zeros(8, 2, dtype=torch.float16), "scales of int4-g8: 16 of torch.float16, expected 24"),
        ("scales", torch.zeros(8, 3, dtype=torch.int16), "scales of int4-g8: 24 of torch.int16"),
        ("zeros", None, "zeros of int4-g8: missing"),
        ("zeros", torch.zeros(11, dtype=torch.uint8), "zeros of int4-g8: 11 of torch.uint8, expected 12"),
    ],
)
def test_damaged_sparse_integers_are_refused(part: str, changed: torch.Tensor | None, message: str) -> None:
    parts = SparseIntegerFormat(4, 8).encode(*integers(8, 3, 8, 4, 0.5))
    damaged = {name: tensor for name, tensor in parts.items() if name != part}
    damaged |= {} if changed is None else {part: changed}
    with pytest.raises(ArtifactError, match=message):
        decode("bitmask-int4-g8", damaged, (8, 24), torch.float32)


@pytest.mark.parametrize("shape", [(8, 20), (0, 24), (8, 32), (1 << 40, 24)])
def test_sparse_integers_of_another_shape_are_refused(shape: tuple[int, int]) -> None:
    parts = SparseIntegerFormat(4, 8).encode(*integers(8, 3, 8, 4, 0.5))
    with pytest.raises(ArtifactError, match="delete the file and run again"):
        decode("bitmask-int4-g8", parts, shape, torch.float32)


def test_parts_that_do_not_fit_are_refused() -> None:
    weights, kept = sparse(8, 24, 0.5, torch.float32)
    parts = BITMASK.encode(weights, kept)
    with pytest.raises(ArtifactError, match="does not fit weights"):
        BITMASK.decode(parts, (8, 32), torch.float32)
    with pytest.raises(ArtifactError, match="are stored; delete"):
        BITMASK.decode({**parts, "values": parts["values"][1:]}, (8, 24), torch.float32)
