"""Packed storage of quantized weights: integers at exactly their bit-width, and how to get weights back.

An integer of 3, 5, 6 or 7 bits is cut into planes of 4, 2 or 1 bits, low bits first. A plane of ``p`` bits holds 8/p
values per byte; byte ``k`` holds values ``k``, ``k + stride``, ``k + 2 stride`` and so on, so unpacking is a shift and
a mask over contiguous bytes, whatever the width. Nothing is wasted beyond filling the last byte of each plane.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from evopress.compression.base import Format
from evopress.compression.grid import SCALE_DTYPE
from evopress.util.errors import ArtifactError

_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}

_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` integers of ``bits`` bits take."""
    return sum(-(-count * plane // 8) for plane in _PLANES[bits])


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack uint8 integers below 2^bits, of any shape, into a flat uint8 tensor of `packed_bytes` bytes."""
    flat = values.flatten()
    planes, shift = [], 0
    for plane in _PLANES[bits]:
        part = flat.bitwise_right_shift(shift).bitwise_and_((1 << plane) - 1)
        planes.append(_pack_plane(part, plane))
        shift += plane
    return torch.cat(planes)


def _pack_plane(values: Tensor, plane: int) -> Tensor:
    per_byte = 8 // plane
    stride = -(-len(values) // per_byte)
    segments = torch.nn.functional.pad(values, (0, per_byte * stride - len(values))).view(per_byte, stride)
    packed = segments[0].clone()
    for index in range(1, per_byte):
        packed |= segments[index] << (plane * index)
    return packed


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The ``count`` integers (uint8, flat) that `pack` packed; on the device of ``packed``."""
    out = torch.empty(count, dtype=torch.uint8, device=packed.device)
    start = shift = 0
    for plane in _PLANES[bits]:
        size = -(-count * plane // 8)
        _unpack_plane(packed[start : start + size], plane, shift, out)
        start += size
        shift += plane
    return out


def _unpack_plane(packed: Tensor, plane: int, shift: int, out: Tensor) -> None:
    """Put a plane's bits into ``out`` at bit ``shift``; the first plane (shift 0) overwrites, others add.

    Works through one small buffer: fresh memory costs more than the arithmetic.
    """
    buffer = torch.empty_like(packed)
    for index, target in enumerate(out.split(len(packed)) if len(packed) else ()):
        bits = torch.bitwise_right_shift(packed[: len(target)], plane * index, out=buffer[: len(target)])
        bits.bitwise_and_((1 << plane) - 1)
        if shift:
            target.add_(bits, alpha=1 << shift)
        else:
            target.copy_(bits)


@dataclass(frozen=True)
class IntegerFormat(Format):
    """Integers of ``bits`` bits with a scale, and unless symmetric a zero point, per ``group`` inputs of a row.

    Parts: ``codes`` (packed, row by row), ``scales`` (float16 or bfloat16 [rows, groups], float32 where float16 cannot
    hold them) and ``zeros`` (packed like the codes).
    Its text form, as in tables, is ``int3-g64`` or ``int3-g64-symmetric``.
    """

    bits: int
    group: int
    symmetric: bool

    def __str__(self) -> str:
        return f"int{self.bits}-g{self.group}" + ("-symmetric" if self.symmetric else "")

    @classmethod
    def parse(cls, text: str) -> "IntegerFormat | None":
        """Read the text form."""
        match = re.fullmatch(r"int([2-8])-g([1-9]\d*)(-symmetric)?", text)
        return match and cls(int(match[1]), int(match[2]), match[3] is not None)

    def bytes(self, rows: int, columns: int) -> int:
        """Exact size of the parts of a layer whose columns the group divides, with scales of 16 bits."""
        return packed_bytes(rows * columns, self.bits) + self.grid_bytes(rows, columns)

    def grid_bytes(self, rows: int, columns: int) -> int:
        """That of scales and zero points alone."""
        grids = rows * (columns // self.group)
        zeros = 0 if self.symmetric else packed_bytes(grids, self.bits)
        return grids * SCALE_DTYPE.itemsize + zeros

    def encode(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
        """Pack codes (uint8 [rows, columns]), scales (of a type above, [rows, groups]) and zeros (uint8)."""
        parts = {"codes": pack(codes, self.bits), "scales": scales.contiguous()}
        if not self.symmetric:
            parts["zeros"] = pack(zeros, self.bits)
        return parts

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Weights (code - zero) x scale [rows, columns], computed in float32, in ``dtype``.

        Raises:
            ArtifactError: the parts do not fit the format and the shape.
        """
        codes, scales, zeros = self.unpacked(parts, shape)
        middle = 2 ** (self.bits - 1)
        grouped = codes.view(*scales.shape, self.group)
        return dequantize(grouped, scales, middle if zeros is None else zeros, dtype).view(shape)

    def unpacked(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes (uint8 [rows, columns]), scales [rows, groups] and, unless symmetric, zeros (uint8 [rows, groups]).

        Raises:
            ArtifactError: the parts do not fit the format and the shape.
        """
        rows, columns = shape
        self.check_grids(parts, rows, columns)
        require_part(parts, "codes", torch.uint8, packed_bytes(rows * columns, self.bits), str(self))
        codes = unpack(parts["codes"], self.bits, rows * columns).view(rows, columns)
        return codes, *self.grids(parts, shape)

    def grids(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Scales [rows, groups] and, unless symmetric, zeros (uint8 [rows, groups]), of parts that were checked."""
        rows, groups = shape[0], shape[1] // self.group
        zeros = None if self.symmetric else unpack(parts["zeros"], self.bits, rows * groups).view(rows, groups)
        return parts["scales"].view(rows, groups), zeros

    def check_grids(self, parts: Mapping[str, Tensor], rows: int, columns: int) -> None:
        """Check the shape, scales and zeros, before anything is allocated.

        Raises:
            ArtifactError: a part does not fit: one that is too short would leave weights to chance.
        """
        if rows < 1 or columns < 1 or columns % self.group:
            raise ArtifactError(f"{self} does not fit weights [{rows}, {columns}]; delete the file and run again")
        grids = rows * (columns // self.group)
        scales = parts.get("scales")
        stored = scales.dtype if scales is not None and scales.dtype in _SCALE_DTYPES else torch.float16
        require_part(parts, "scales", stored, grids, str(self))
        if not self.symmetric:
            require_part(parts, "zeros", torch.uint8, packed_bytes(grids, self.bits), str(self))


def require_part(parts: Mapping[str, Tensor], name: str, dtype: torch.dtype, size: int, form: str) -> None:
    """Check that a part of the format ``form`` is there, of this type and number of elements.

    Raises:
        ArtifactError: it is not.
    """
    part = parts.get(name)
    if part is None or part.dtype != dtype or part.numel() != size:
        found = "missing" if part is None else f"{part.numel()} of {part.dtype}"
        raise ArtifactError(f"{name} of {form}: {found}, expected {size}; delete the file and run again")


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor | int, dtype: torch.dtype) -> Tensor:
    """Weights (code - zero) x scale, computed in float32, in ``dtype``.

    Args:
        codes: uint8 [rows, groups, inputs of a group].
        scales: [rows, groups].
        zeros: uint8 [rows, groups], or one for all.
        dtype: of the result.
    """
    weights = codes.float()
    weights.sub_(zeros if isinstance(zeros, int) else zeros[..., None].float())
    return weights.mul_(scales[..., None].float()).to(dtype)
