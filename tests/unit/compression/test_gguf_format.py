"""GGUF blocks, against the dequantizers of the `gguf` package."""

import gguf
import numpy as np
import pytest
import torch

from evopress.compression.formats.gguf import GgufFormat, encode, read_grids, read_integers
from evopress.compression.gguf_types import GGUF_TYPES, possible_types
from evopress.util.errors import ArtifactError, CompressionError

ROWS, BLOCKS = 5, 3
NAMES = list(GGUF_TYPES)
WITH_GRID = [name for name, kind in GGUF_TYPES.items() if kind.grid]


def random_blocks(name: str) -> torch.Tensor:
    """Blocks with any bits; the float16 numbers of those with a grid are finite, so that equality means something."""
    kind = GGUF_TYPES[name]
    generator = torch.Generator().manual_seed(NAMES.index(name))
    blocks = torch.randint(0, 256, (ROWS, BLOCKS, kind.bytes), generator=generator, dtype=torch.uint8)
    if kind.grid:
        for start in (kind.grid.step, kind.grid.offset):
            if start is not None:
                half = torch.randn(ROWS, BLOCKS, 1, generator=generator).half()
                blocks[..., start : start + 2] = half.view(torch.uint8)
    return blocks.flatten(1)


def oracle(blocks: torch.Tensor, name: str) -> np.ndarray:
    return gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name])


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_those_of_the_specification(name):
    kind = GGUF_TYPES[name]
    assert (kind.block, kind.bytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert GgufFormat(kind).bytes(7, 2 * kind.block) == 14 * kind.bytes


@pytest.mark.parametrize("name", NAMES)
def test_decodes_any_bytes_to_the_very_numbers_of_the_gguf_package(name):
    kind, blocks = GGUF_TYPES[name], random_blocks(name)
    with np.errstate(all="ignore"):
        expected = oracle(blocks, name)
    decoded = GgufFormat(kind).decode({"blocks": blocks}, (ROWS, BLOCKS * kind.block), torch.float32)
    np.testing.assert_array_equal(decoded.numpy(), expected)
    half = GgufFormat(kind).decode({"blocks": blocks}, (ROWS, BLOCKS * kind.block), torch.bfloat16)
    assert torch.equal(half.nan_to_num(), torch.from_numpy(expected).bfloat16().nan_to_num())


@pytest.mark.parametrize("name", WITH_GRID)
def test_encode_writes_every_byte_that_decode_reads(name):
    kind, blocks = GGUF_TYPES[name], random_blocks(name)
    split = blocks.view(ROWS, BLOCKS, kind.bytes)
    codes = read_integers(split, kind.grid.codes, kind.block).flatten(1)
    assert torch.equal(encode(codes, read_grids(split, kind), kind)["blocks"], blocks)


@pytest.mark.parametrize("name", NAMES)
def test_is_read_by_the_name_that_it_writes(name):
    form = GgufFormat(GGUF_TYPES[name])
    assert GgufFormat.parse(str(form)) == form


@pytest.mark.parametrize("text", ["int3-g64", "gguf-Q9_9", "Q4_0", "bitmask", ""])
def test_leaves_other_names_to_others(text):
    assert GgufFormat.parse(text) is None


@pytest.mark.parametrize(
    "blocks, shape, message",
    [
        (None, (2, 64), "are missing"),
        (torch.zeros(2, 36, dtype=torch.uint8), (2, 48), "no whole blocks"),
        (torch.zeros(2, 35, dtype=torch.uint8), (2, 64), r"expected \[2, 36\]"),
        (torch.zeros(2, 36, dtype=torch.int8), (2, 64), "int8"),
    ],
)
def test_refuses_parts_that_do_not_fit(blocks, shape, message):
    parts = {} if blocks is None else {"blocks": blocks}
    with pytest.raises(ArtifactError, match=message):
        GgufFormat(GGUF_TYPES["Q4_0"]).decode(parts, shape, torch.float32)


def test_offers_only_types_whose_blocks_fill_the_rows():
    names = ["Q6_K", "Q4_0", "Q2_K", "Q8_0"]
    assert [kind.name for kind in possible_types(names, 512)] == ["Q2_K", "Q4_0", "Q6_K", "Q8_0"]
    assert [kind.name for kind in possible_types(names, 576)] == ["Q4_0", "Q8_0"]
    with pytest.raises(CompressionError, match=r"Q6_K can hold rows of 576 .* name a type with blocks of 32"):
        possible_types(["Q6_K"], 576)
    with pytest.raises(CompressionError, match="rows of 100 weights"):
        possible_types(names, 100)
