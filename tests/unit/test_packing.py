"""Packed integers and the weights that they stand for."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evopress.compression.formats import decode
from evopress.compression.formats.integer import IntegerFormat, pack, packed_bytes, unpack
from evopress.util.errors import ArtifactError

WIDTHS = range(2, 9)


@st.composite
def codes(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    bits = draw(st.integers(2, 8))
    rows, columns = draw(st.integers(0, 9)), draw(st.integers(1, 37))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator), bits


@settings(deadline=None, max_examples=200)
@given(codes())
def test_roundtrip_at_the_exact_size(drawn):
    values, bits = drawn
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8 and packed.nbytes == packed_bytes(values.numel(), bits)
    # each of up to three planes fills its last byte
    assert 0 <= packed.nbytes - values.numel() * bits / 8 < 3
    assert torch.equal(unpack(packed, bits, values.numel()).view(values.shape), values)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_in_every_position(bits):
    values = torch.cat([torch.arange(2**bits, dtype=torch.uint8).roll(shift) for shift in range(8)])
    packed = pack(values, bits)
    assert packed.nbytes == math.ceil(len(values) * bits / 8)
    assert torch.equal(unpack(packed, bits, len(values)), values)


def test_unaligned_storage():
    """Memory-mapped tensors may start at any byte."""
    values = torch.randint(0, 8, (41,), dtype=torch.uint8)
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), pack(values, 3)])[3:]
    assert torch.equal(unpack(shifted, 3, 41), values)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [4, 12])
def test_decode_is_code_minus_zero_times_scale(bits, symmetric, group):
    generator = torch.Generator().manual_seed(bits)
    shape = (5, 12)
    values = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)
    scales = torch.rand(5, 12 // group, generator=generator).half()
    zeros = torch.randint(0, 2**bits, (5, 12 // group), dtype=torch.uint8, generator=generator)
    form = IntegerFormat(bits, group, symmetric)
    parts = form.encode(values, scales, zeros)
    middle = torch.full_like(zeros, 2 ** (bits - 1))
    zero = (middle if symmetric else zeros).float().repeat_interleave(group, 1)
    expected = (values.float() - zero) * scales.float().repeat_interleave(group, 1)
    assert torch.equal(decode(str(form), parts, shape, torch.float32), expected)
    assert torch.equal(decode(str(form), parts, shape, torch.bfloat16), expected.bfloat16())
    assert ("zeros" in parts) is not symmetric


def test_bytes_are_those_of_codes_scales_and_zeros():
    form = IntegerFormat(3, 64, False)
    shape = (16, 128)
    parts = form.encode(
        torch.zeros(shape, dtype=torch.uint8), torch.ones(16, 2).half(), torch.zeros(16, 2, dtype=torch.uint8)
    )
    stored = sum(part.nbytes for part in parts.values())
    assert form.bytes(*shape) == stored == 16 * 128 * 3 // 8 + 32 * 2 + 32 * 3 // 8
    assert 8 * stored / (16 * 128) == 3 + (16 + 3) / 64


@pytest.mark.parametrize("form", [IntegerFormat(3, 64, False), IntegerFormat(8, 1, True)])
def test_format_text(form):
    assert IntegerFormat.parse(str(form)) == form


@pytest.mark.parametrize("text", ["int9-g64", "int3", "int3-g0", "int3-g64-asymmetric", "ternary"])
def test_unknown_format(text):
    with pytest.raises(ArtifactError, match="not a format"):
        decode(text, {}, (1, 1), torch.float32)
