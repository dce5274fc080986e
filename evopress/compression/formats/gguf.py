"""Weights stored as a GGUF file stores them: rows of blocks, byte for byte."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from evopress.compression.base import Format
from evopress.compression.gguf_types import GGUF_TYPES, GgufGrid, GgufType, Plane
from evopress.util.errors import ArtifactError

_PREFIX = "gguf-"
_ROWS_AT_ONCE = 2**22
"""Weights that are decoded at once: what that takes beside the result is several times as large as they are."""


@dataclass(frozen=True)
class GgufFormat(Format):
    """One part, ``blocks`` (uint8 [rows, bytes of a row]): the tensor's data in a GGUF file.

    Its text form, as in tables, is ``gguf-Q4_K``.
    """

    type: GgufType

    def __str__(self) -> str:
        return _PREFIX + self.type.name

    @classmethod
    def parse(cls, text: str) -> "GgufFormat | None":
        """Read the text form."""
        kind = GGUF_TYPES.get(text.removeprefix(_PREFIX)) if text.startswith(_PREFIX) else None
        return None if kind is None else cls(kind)

    def bytes(self, rows: int, columns: int) -> int:
        """Exact size of the part.

        Raises:
            CompressionError: rows of so many columns are no whole blocks.
        """
        return rows * self.type.row_bytes(columns)

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Weights [rows, columns] in ``dtype``, computed in float32 as the runtimes do, on the device of the part.

        Raises:
            ArtifactError: the part does not fit the type and the shape.
        """
        rows, columns = shape
        blocks = parts.get("blocks")
        count = columns // self.type.block
        if blocks is None or rows < 1 or count < 1 or columns % self.type.block:
            what = "blocks are missing" if blocks is None else "they are no whole blocks"
            raise ArtifactError(f"{self} of weights {list(shape)}: {what}; delete the file and run again")
        if blocks.dtype != torch.uint8 or blocks.shape != (rows, count * self.type.bytes):
            raise ArtifactError(
                f"{self} of weights {list(shape)}: blocks {list(blocks.shape)} of {blocks.dtype}, expected "
                f"{[rows, count * self.type.bytes]} bytes; delete the file and run again"
            )
        weights = torch.empty(shape, dtype=dtype, device=blocks.device)
        height = max(1, _ROWS_AT_ONCE // columns)
        for part, target in zip(blocks.split(height), weights.split(height), strict=True):
            target.copy_(self._weights(part.view(len(part), count, self.type.bytes)))
        return weights

    def _weights(self, blocks: Tensor) -> Tensor:
        """Float32 weights [rows, columns] of blocks [rows, blocks, bytes]."""
        grid = self.type.grid
        if grid is None:
            return _from_codebook(blocks, self.type)
        codes = read_integers(blocks, grid.codes, self.type.block)
        grids = read_grids(blocks, self.type)
        return grids.weights(values_of(codes.flatten(1), grid), grid)


@dataclass(frozen=True)
class Grids:
    """The numbers, beside codes, of which the rows of a weight are made, as the type stores them."""

    step: Tensor
    """d, float16 [rows, blocks]."""
    offset: Tensor | None
    """Of the minima, float16 [rows, blocks]."""
    scales: Tensor | None
    """int16 [rows, blocks, groups of a block]; None where the type has none."""
    minima: Tensor | None
    """int16 [rows, blocks, groups of a block]."""

    def steps(self) -> Tensor:
        """By how much weights differ whose values differ by 1, float32 [rows, groups]."""
        step = self.step.float()
        return step if self.scales is None else (step[..., None] * self.scales.float()).flatten(1)

    def offsets(self) -> Tensor | None:
        """The weight of value 0, float32 [rows, groups]; None where it is 0."""
        if self.offset is None:
            return None
        offset = self.offset.float()
        return offset if self.minima is None else -(offset[..., None] * self.minima.float()).flatten(1)

    def weights(self, values: Tensor, grid: GgufGrid) -> Tensor:
        """Weights that ``values`` (float32 [rows, columns], overwritten) stand for."""
        grouped = values.view(len(values), -1, grid.group).mul_(self.steps()[..., None])
        offsets = self.offsets()
        return (grouped if offsets is None else grouped.add_(offsets[..., None])).view_as(values)


def values_of(codes: Tensor, grid: GgufGrid) -> Tensor:
    """What codes (uint8) stand for, float32, same shape."""
    if grid.is_linear:
        return codes.float().add_(grid.values[0])
    return _value_table(grid, codes.device).index_select(0, codes.int().flatten()).view(codes.shape)


@cache
def _value_table(grid: GgufGrid, device: torch.device) -> Tensor:
    return torch.tensor(grid.values, dtype=torch.float32, device=device)


def encode(codes: Tensor, grids: Grids, kind: GgufType) -> dict[str, Tensor]:
    """Pack codes (uint8 [rows, columns]) and the grids of a type that has some."""
    grid = kind.grid
    assert grid is not None
    rows = len(codes)
    grouped = codes.view(rows, -1, kind.block)
    blocks = torch.zeros(rows, grouped.shape[1], kind.bytes, dtype=torch.uint8, device=codes.device)
    _write_integers(grouped, grid.codes, blocks)
    for start, number in ((grid.step, grids.step), (grid.offset, grids.offset)):
        if start is not None and number is not None:
            blocks[..., start : start + 2] = number[..., None].contiguous().view(torch.uint8)
    if grids.scales is not None:
        stored = (grids.scales - grid.scale_values[0]).to(torch.uint8)
        if grids.minima is not None:
            stored = torch.cat([stored, grids.minima.to(torch.uint8)], dim=-1)
        if grid.interleaved:
            _write_interleaved(stored, blocks[..., 4:16])
        else:
            _write_integers(stored, grid.scales, blocks)
    return {"blocks": blocks.flatten(1)}


def read_grids(blocks: Tensor, kind: GgufType) -> Grids:
    """What blocks [rows, blocks, bytes] hold beside their codes."""
    grid = kind.grid
    assert grid is not None
    step = _read_half(blocks, grid.step)
    offset = None if grid.offset is None else _read_half(blocks, grid.offset)
    if not grid.is_nested:
        return Grids(step, offset, None, None)
    groups = kind.block // grid.group
    count = groups if offset is None else 2 * groups
    stored = _read_interleaved(blocks[..., 4:16]) if grid.interleaved else read_integers(blocks, grid.scales, count)
    scales = stored[..., :groups].to(torch.int16) + grid.scale_values[0]
    return Grids(step, offset, scales, None if offset is None else stored[..., groups:].to(torch.int16))


def _read_half(blocks: Tensor, start: int) -> Tensor:
    return blocks[..., start : start + 2].contiguous().view(torch.float16)[..., 0]


def read_integers(blocks: Tensor, planes: Sequence[Plane], count: int) -> Tensor:
    """The ``count`` integers (uint8 [..., count]) whose bits lie in ``planes`` of each block."""
    total = torch.zeros(*blocks.shape[:-1], count, dtype=torch.uint8, device=blocks.device)
    position = 0
    for plane in planes:
        size = count * plane.bits // 8
        stored = blocks[..., plane.start : plane.start + size].unflatten(-1, (-1, 1, plane.stride))
        if plane.bits == 8:
            return (stored ^ 0x80).reshape(total.shape)
        shifts = torch.arange(0, 8, plane.bits, dtype=torch.uint8, device=blocks.device)[:, None]
        bits = (stored >> shifts).bitwise_and_((1 << plane.bits) - 1)
        total |= bits.reshape(total.shape) << position
        position += plane.bits
    return total


def _write_integers(integers: Tensor, planes: Sequence[Plane], blocks: Tensor) -> None:
    """Put integers (uint8 [..., count]) into ``planes`` of each block, whose bits there are 0."""
    position, count = 0, integers.shape[-1]
    for plane in planes:
        target = blocks[..., plane.start : plane.start + count * plane.bits // 8]
        bits = (
            (integers >> position)
            .bitwise_and_((1 << plane.bits) - 1)
            .unflatten(-1, (-1, 8 // plane.bits, plane.stride))
        )
        if plane.bits == 8:
            target.copy_(integers ^ 0x80)
        for index in range(8 // plane.bits if plane.bits < 8 else 0):
            target |= (bits[..., index, :] << (plane.bits * index)).flatten(-2)
        position += plane.bits


def _read_interleaved(stored: Tensor) -> Tensor:
    """Eight scales and eight minima (uint8 [..., 16]) from 12 bytes.

    The first four of each are the low six bits of bytes 0 to 7. The last four have their low four bits in the halves of
    bytes 8 to 11, and their high two on top of bytes 0 to 7.
    """
    first, second = stored[..., :8], stored[..., 8:].repeat(*[1] * (stored.dim() - 1), 2)
    low = torch.cat([second[..., :4] & 0x0F, second[..., 4:] >> 4], dim=-1)
    late = low | (first >> 2 & 0x30)
    early = first & 0x3F
    return torch.cat([early[..., :4], late[..., :4], early[..., 4:], late[..., 4:]], dim=-1)


def _write_interleaved(integers: Tensor, stored: Tensor) -> None:
    """The inverse of `_read_interleaved`."""
    quarters = integers.unflatten(-1, (4, 4))
    early, late = quarters[..., 0::2, :].flatten(-2), quarters[..., 1::2, :].flatten(-2)
    stored[..., :8] = early | (late >> 4) << 6
    stored[..., 8:] = (late[..., :4] & 0x0F) | (late[..., 4:] & 0x0F) << 4


def _from_codebook(blocks: Tensor, kind: GgufType) -> Tensor:
    """Weights of the types with codebooks, which only the `gguf` package knows; it works on the CPU."""
    import gguf

    rows = blocks.flatten(1).cpu().numpy()
    return torch.from_numpy(gguf.dequantize(rows, gguf.GGMLQuantizationType[kind.name])).to(blocks.device)
