"""Blocks with the weights that a candidate chose: unpacked when needed, kept while there is room."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor

from evopress.models.blockwise import BlockInputs, BlockwiseModel
from evopress.models.structure import linear_layers
from evopress.search.counters import Counters
from evopress.search.space import Unit

Unpack = Callable[[int, str, str], Tensor]
"""(block, layer, level label) -> weight [rows, columns] in the model's dtype, on its device."""


class WeightCache:
    """Unpacked weights by (unit, level); those unused for longest go when ``limit`` bytes are passed."""

    def __init__(self, units: Sequence[Unit], unpack: Unpack, limit: int, counters: Counters) -> None:
        self.units, self.unpack, self.limit, self.counters = units, unpack, limit, counters
        self.kept: OrderedDict[tuple[int, int], Tensor] = OrderedDict()
        self.bytes = 0

    def weight(self, unit: int, level: int) -> Tensor:
        """Weight [rows, columns] of a unit at a level."""
        key = (unit, level)
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key]
        chosen = self.units[unit]
        weight = self.unpack(chosen.block, chosen.layer, chosen.levels[level].label)
        self.counters.unpacked += 1
        self.counters.unpacked_bytes += weight.nbytes
        self._keep(key, weight)
        return weight

    def _keep(self, key: tuple[int, int], weight: Tensor) -> None:
        if weight.nbytes > self.limit:
            return
        while self.bytes + weight.nbytes > self.limit:
            self.bytes -= self.kept.popitem(last=False)[1].nbytes
        self.kept[key] = weight
        self.bytes += weight.nbytes


class VariantBlocks:
    """The blocks of a model, run with a choice of levels for their units.

    A block whose linear layers are all units needs only its other parameters (norms, biases), which stay loaded.
    Blocks that keep a dense linear layer stay loaded if half of the weights' memory holds them all; otherwise each
    is loaded for the time that candidates pass it.
    """

    def __init__(self, model: BlockwiseModel, units: Sequence[Unit], unpack: Unpack, limit: int, counters: Counters):
        self.model = model
        self.units_of: list[list[int]] = [[] for _ in model.blocks]
        for index, unit in enumerate(units):
            self.units_of[unit.block].append(index)
        self.layers = [[units[index].layer for index in members] for members in self.units_of]
        dense = [self._dense_bytes(block) for block in range(len(model.blocks))]
        kept = sum(dense) <= limit // 2
        self.streamed = [bool(size) and not kept for size in dense]
        room = limit - (sum(dense) if kept else max(dense))
        self.cache = WeightCache(units, unpack, room, counters)
        for block, size in enumerate(dense):
            if not self.streamed[block]:
                model.load_block(block, linear_weights=size > 0)

    def enter(self, block: int) -> None:
        """Make a block ready for `run`."""
        if self.streamed[block]:
            self.model.load_block(block)

    def leave(self, block: int) -> None:
        """Candidates have passed the block."""
        if self.streamed[block]:
            self.model.unload_block(block)

    def run(self, block: int, levels: Sequence[int], hidden: Tensor, inputs: BlockInputs) -> Tensor:
        """Hidden states [N, L, H] after a block whose units are at ``levels``."""
        units = self.units_of[block]
        chosen = zip(self.layers[block], units, levels, strict=True)
        weights = {layer: self.cache.weight(unit, level) for layer, unit, level in chosen}
        return self.model.run_block(block, hidden, inputs, weights)

    def _dense_bytes(self, block: int) -> int:
        """Bytes of a block's parameters if one of its linear layers is not a unit, else 0."""
        module = self.model.blocks[block]
        if set(linear_layers(module)) <= set(self.layers[block]):
            return 0
        return sum(parameter.numel() for parameter in module.parameters()) * self.model.dtype.itemsize
