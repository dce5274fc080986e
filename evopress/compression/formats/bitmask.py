"""Packed storage of sparse weights: a bit for each weight, and the values of those that are kept.

Both parts run over the weight row by row. At half sparsity in bfloat16 that is 9 bits a weight in place of 16.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evopress.compression.base import Format
from evopress.util.errors import ArtifactError

_HOST = "cpu"
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class BitmaskFormat(Format):
    """Parts: ``mask`` (uint8, lowest bit first) and ``values``, in the type of the dense weights."""

    def __str__(self) -> str:
        return "bitmask"

    @classmethod
    def parse(cls, text: str) -> "BitmaskFormat | None":
        """Read the text form."""
        return cls() if text == str(cls()) else None

    def bytes(self, parameters: int, kept: int, itemsize: int) -> int:
        """Exact size of the parts, where ``kept`` of so many weights are."""
        return mask_bytes(parameters) + kept * itemsize

    def encode(self, weights: Tensor, kept: Tensor) -> dict[str, Tensor]:
        """Pack weights of any floating type and shape, on the CPU, without those not ``kept`` (bool, same shape)."""
        mask, flat = kept.cpu().flatten().numpy(), weights.cpu().flatten()
        # numpy knows no bfloat16, and selects many times faster than torch: it is given the bits as integers.
        values = np.compress(mask, flat.view(_INTEGERS[flat.itemsize]).numpy())
        return {"mask": pack_mask(mask), "values": torch.from_numpy(values).view(weights.dtype)}

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Weights [rows, columns] in ``dtype``, on the device of the parts.

        Raises:
            ArtifactError: mask and values do not fit each other or the shape.
        """
        kept, values = kept_positions(parts, shape), parts.get("values")
        if values is None or len(kept) != values.numel():
            stored = 0 if values is None else values.numel()
            raise ArtifactError(f"a mask keeps {len(kept)} weights, {stored} are stored; delete the file and run again")
        weights = torch.zeros(shape, dtype=dtype, device=values.device)
        weights.view(-1).scatter_(0, kept, values.flatten().to(dtype))
        return weights


def mask_bytes(parameters: int) -> int:
    """Size of the mask of so many weights."""
    return -(-parameters // 8)


def pack_mask(kept: NDArray[np.bool_]) -> Tensor:
    """The mask (uint8, flat, lowest bit first) of the weights that are ``kept`` (flat)."""
    return torch.from_numpy(np.packbits(kept, bitorder="little"))


def kept_positions(parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """Flat indices (int64) of the weights that the part ``mask`` keeps, on its device.

    Raises:
        ArtifactError: the mask is missing, or does not fit the shape.
    """
    mask, count = parts.get("mask"), math.prod(shape)
    if mask is None or mask.dtype != torch.uint8 or min(shape) < 1:
        raise ArtifactError(f"a mask is missing for weights {list(shape)}; delete the file and run again")
    if mask.numel() != mask_bytes(count):  # checked before anything is allocated
        raise ArtifactError(
            f"a mask of {mask.numel()} bytes does not fit weights {list(shape)}; delete the file, run again"
        )
    return _positions(mask.flatten(), count)


def _positions(mask: Tensor, count: int) -> Tensor:
    """Where the first ``count`` bits of a mask are set, int64; on a CPU by numpy, which unpacks bits natively."""
    if mask.device.type == _HOST:
        bits = np.unpackbits(mask.numpy(), count=count, bitorder="little").view(np.bool_)
        return torch.from_numpy(np.flatnonzero(bits))
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    unpacked = mask[:, None].bitwise_right_shift(shifts).bitwise_and_(1).flatten()[:count]
    return unpacked.nonzero()[:, 0]
