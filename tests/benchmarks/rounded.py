"""Variants for the fitness benchmark, in memory: packed as the workflow packs them, rounded to nearest."""

from collections.abc import Iterable

import torch
from torch import Tensor

from evopress.compression.base import Unit
from evopress.compression.formats import decode
from evopress.compression.formats.integer import IntegerFormat
from evopress.compression.grid import fit_grid, highest_codes, quantize
from evopress.models.checkpoint import Checkpoint

GROUP = 64


class RoundedVariants:
    """Layers rounded to nearest on min-max grids; unpacking costs what it costs for GPTQ's, whose format this is."""

    def __init__(self, checkpoint: Checkpoint, units: Iterable[Unit]) -> None:
        self.checkpoint = checkpoint
        self.names = {(unit.block, unit.layer): unit.name for unit in units}
        self.packed: dict[tuple[int, str, str], tuple[IntegerFormat, dict[str, Tensor], tuple[int, int]]] = {}

    def make(self, block: int, layer: str, level: str) -> None:
        """Make one variant, unless it is there."""
        if (block, layer, level) not in self.packed:
            name = f"{self.names[block, layer]}.weight"
            weight = self.checkpoint.read([name], dtype=torch.float32)[name]
            self.packed[block, layer, level] = round_to_nearest(weight, int(level))

    def weight(self, block: int, layer: str, level: str, dtype: torch.dtype) -> Tensor:
        """Unpacked weight [rows, columns]."""
        form, parts, shape = self.packed[block, layer, level]
        return decode(str(form), parts, shape, dtype)


def round_to_nearest(weight: Tensor, bits: int) -> tuple[IntegerFormat, dict[str, Tensor], tuple[int, int]]:
    """Format, packed parts and shape of ``weight`` [rows, columns] at ``bits`` bits."""
    rows, columns = weight.shape
    highest = highest_codes(torch.tensor([bits]))[:, None]
    codes, scales, zeros = [], [], []
    for values in weight.t().split(GROUP):
        grid = fit_grid(values[:, None], highest, symmetric=False)
        codes.append(quantize(values[:, None], grid, highest)[:, 0].t())
        scales.append(grid.scales[0])
        zeros.append(grid.zeros[0])
    form = IntegerFormat(bits, GROUP, symmetric=False)
    parts = form.encode(torch.cat(codes, 1).byte(), torch.stack(scales, 1).half(), torch.stack(zeros, 1).byte())
    return form, parts, (rows, columns)
