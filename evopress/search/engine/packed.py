"""Packed variants in host memory, or mapped from their files, and unpacked on the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from evopress.compression.formats import decode
from evopress.compression.store import VariantStore


class PackedWeights:
    """Unpacks variants on a device.

    They are held in host memory if all of them fit in ``limit`` bytes, each from its first use on; else they are read
    through the memory map of their files whenever they are unpacked. For an accelerator host memory is pinned, so that
    copies run beside its work.
    """

    def __init__(
        self, store: VariantStore, device: torch.device, stored: torch.dtype, dtype: torch.dtype, limit: int
    ) -> None:
        """Hold nothing yet; weights are rounded to ``stored``, as in the exported model, and given as ``dtype``."""
        self.store, self.device, self.stored, self.dtype = store, device, stored, dtype
        total = int(store.table["bytes"].sum())
        self.held: dict[tuple[int, str, str], dict[str, Tensor]] | None = {} if total <= limit else None
        self.bytes = total if self.held is not None else 0
        """Host memory that is, or will be, held."""

    def unpack(self, block: int, layer: str, level: str) -> Tensor:
        """Weight [rows, columns] of a layer at a level, on the device.

        Raises:
            ArtifactError: there is no such variant, or the file cannot be read.
        """
        parts = self._parts(block, layer, level)
        moved = {name: part.to(self.device, non_blocking=True) for name, part in parts.items()}
        shape = self.store.shape(block, layer)
        return decode(self.store.format(block, layer, level), moved, shape, self.stored, self.device).to(self.dtype)

    def read_ahead(self, block: int, variants: Sequence[tuple[str, str]]) -> None:
        """Variants of a block, (layer, level) each, will be unpacked soon: read from disk what is not yet held."""
        held = self.held or {}
        self.store.read_ahead(block, [variant for variant in variants if (block, *variant) not in held])

    def _parts(self, block: int, layer: str, level: str) -> dict[str, Tensor]:
        if self.held is not None and (block, layer, level) in self.held:
            return self.held[block, layer, level]
        mapped = self.store.packed(block, layer, level)
        if self.device.type == "cuda":
            parts = {name: part.pin_memory() for name, part in mapped.items()}
        else:
            parts = mapped if self.held is None else {name: part.clone() for name, part in mapped.items()}
        if self.held is not None:
            self.held[block, layer, level] = parts
        return parts
