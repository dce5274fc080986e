"""Packed storage of weights that are both sparse and quantized: a bit for each, and integers for those that are kept.

Mask and integers run over the weight row by row; scales and zero points are those of dense integers. At half sparsity
with 4 bits in groups of 64 that is 3.31 bits a weight.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evopress.compression.base import Format
from evopress.compression.formats.bitmask import kept_positions, mask_bytes, pack_mask
from evopress.compression.formats.integer import IntegerFormat, dequantize, pack, packed_bytes, require_part, unpack


@dataclass(frozen=True)
class SparseIntegerFormat(Format):
    """Integers of ``bits`` bits for the weights that are kept, with a scale and a zero point per ``group`` inputs.

    Parts: ``mask`` as of `BitmaskFormat`, ``codes`` (packed, of the kept weights alone), ``scales`` and ``zeros`` as of
    `IntegerFormat`. Its text form is ``bitmask-int4-g64``.
    """

    bits: int
    group: int

    def __str__(self) -> str:
        return f"bitmask-{self._dense}"

    @property
    def _dense(self) -> IntegerFormat:
        """Of as many integers with nothing removed."""
        return IntegerFormat(self.bits, self.group, symmetric=False)

    @classmethod
    def parse(cls, text: str) -> "SparseIntegerFormat | None":
        """Read the text form."""
        match = re.fullmatch(r"bitmask-int([2-8])-g([1-9]\d*)", text)
        return match and cls(int(match[1]), int(match[2]))

    def bytes(self, rows: int, columns: int, kept: int) -> int:
        """Exact size of the parts of a layer whose columns the group divides, with scales of 16 bits."""
        codes, grids = packed_bytes(kept, self.bits), self._dense.grid_bytes(rows, columns)
        return mask_bytes(rows * columns) + codes + grids

    def encode(self, codes: Tensor, kept: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
        """Pack on the CPU, without codes that are not ``kept``.

        Args:
            codes: uint8 [rows, columns].
            kept: bool [rows, columns].
            scales: of a type that integers have, [rows, groups].
            zeros: uint8 [rows, groups].
        """
        mask = kept.cpu().flatten().numpy()
        left = torch.from_numpy(np.compress(mask, codes.cpu().flatten().numpy()))
        return {
            "mask": pack_mask(mask),
            "codes": pack(left, self.bits),
            "scales": scales.cpu().contiguous(),
            "zeros": pack(zeros.cpu(), self.bits),
        }

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Weights (code - zero) x scale [rows, columns], computed in float32, in ``dtype``; removed ones are zero.

        Raises:
            ArtifactError: the parts do not fit the format, each other or the shape.
        """
        rows, columns = shape
        self._dense.check_grids(parts, rows, columns)
        positions = kept_positions(parts, shape)
        require_part(parts, "codes", torch.uint8, packed_bytes(len(positions), self.bits), str(self))
        scales, zeros = self._dense.grids(parts, shape)
        assert zeros is not None
        # A weight that was removed has the zero point as its code: it decodes to an exact zero.
        filled = zeros[..., None].expand(*zeros.shape, self.group).clone(memory_format=torch.contiguous_format)
        filled.view(-1).scatter_(0, positions, unpack(parts["codes"], self.bits, len(positions)))
        return dequantize(filled, scales, zeros, dtype).view(shape)
