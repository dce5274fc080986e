"""Blocks with the weights that a candidate chose: unpacked when needed, kept while there is room.

Packed variants lie in host memory, or are mapped from their files.

On an accelerator, weights are loaded beside its work, on a CUDA stream of their own. On a CPU there is nothing to load
beside: unpacking would take the very cores that run the blocks. There, weights are loaded when they are used, and only
the disk works ahead.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evopress.compression.families import DROP
from evopress.compression.formats import decode
from evopress.compression.joint import JointStore
from evopress.compression.store import VariantStore
from evopress.models.blockwise import BlockInputs, BlockwiseModel
from evopress.models.modules import EMBEDDING, HEAD, OUTER, module_kind
from evopress.models.structure import linear_layers
from evopress.search.space import DENSE_LEVEL, Unit

Unpack = Callable[[int, str, str], Tensor]
"""(block, layer, level label) -> weight [rows, columns] in the model's dtype, on its device."""
ReadAhead = Callable[[int, Sequence[tuple[str, str]]], None]
"""(block, its variants as (layer, level label)): they will be unpacked soon."""
Key = tuple[int, str, str | None]
"""Block, layer and level label of a weight; the label of a dense weight is None."""


@dataclass
class Counters:
    """Sums over a run. Work is counted in tokens, once for each block (or head) that they pass."""

    block_tokens: int = 0
    """Blocks x tokens that were run."""
    block_tokens_alone: int = 0
    """Blocks x tokens of one full forward pass per candidate."""
    head_tokens: int = 0
    """Tokens whose logits were computed, the dense model's included."""
    candidate_tokens: int = 0
    """Candidates x tokens that were evaluated."""
    unpacked: int = 0
    """Layer variants that were unpacked."""
    unpacked_bytes: int = 0
    dense_bytes: int = 0
    """Bytes of layers that stay dense, each time that they were read."""
    peak_weight_bytes: int = 0
    """Most that unpacked and dense weights held at once."""
    peak_state_bytes: int = 0
    """Most that hidden states held at once: those before a block and those after it."""
    evaluations: int = 0
    """Times that candidates were evaluated together."""

    @property
    def share_of_block_work(self) -> float:
        """Block work done, as a share of that of one candidate at a time."""
        return self.block_tokens / max(1, self.block_tokens_alone)

    def summary(self, seconds: float) -> str:
        """The work of ``seconds``, in words."""
        speed = self.candidate_tokens / max(seconds, 1e-9)
        weights, states = (size / 1e9 for size in (self.peak_weight_bytes, self.peak_state_bytes))
        return (
            f"{self.candidate_tokens} tokens of candidates at {speed:.3g} a second, "
            f"{self.share_of_block_work:.1%} of the block work of one candidate at a time, "
            f"at most {weights:.3g} GB of weights and {states:.3g} GB of hidden states"
        )


@dataclass(frozen=True)
class Loaded:
    """A weight, and what tells that it is there."""

    weight: Tensor
    ready: torch.cuda.Event | None = None


class SideStream:
    """A stream for loading; the current stream waits for each weight before it uses it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.finished: torch.cuda.Event | None = None

    @property
    def overlaps(self) -> bool:
        """Whether loading runs beside other work."""
        return self.stream is not None

    def load(self, load: Callable[[], Tensor]) -> Loaded:
        """Start to load a weight."""
        if self.stream is None:
            return Loaded(load())
        with torch.cuda.stream(self.stream):
            weight = load()
            # Memory of this stream is not given to another weight before the work that uses this one is done.
            weight.record_stream(torch.cuda.default_stream(self.device))
            return Loaded(weight, self.stream.record_event())

    def use(self, loaded: Loaded) -> Tensor:
        """The weight, for work that is queued from now on."""
        if loaded.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(loaded.ready)
        return loaded.weight

    def keep_pace(self) -> None:
        """A block's work has been queued: wait until that of the block before it is done.

        Weights that are dropped stay in memory until the work that uses them has run. Without this, the host would
        load far ahead of the device, and past the limit.
        """
        if self.stream is None:
            return
        before, self.finished = self.finished, torch.cuda.current_stream(self.device).record_event()
        if before is not None:
            before.synchronize()


class WeightCache:
    """Weights on the device; those unused for longest go before ``limit`` bytes are passed.

    A weight larger than the limit is not kept beyond its use.
    """

    def __init__(
        self,
        load: Callable[[Key], Tensor],
        size: Callable[[Key], int],
        limit: int,
        counters: Counters,
        stream: SideStream,
    ) -> None:
        self.load, self.size, self.limit, self.counters, self.stream = load, size, limit, counters, stream
        self.kept: OrderedDict[Key, Loaded] = OrderedDict()
        self.bytes = 0

    def weight(self, key: Key) -> Tensor:
        """Weight [rows, columns], loaded unless it is kept."""
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.stream.use(self.kept[key])
        self._make_room(self.size(key), spare=())
        return self.stream.use(self._load(key))

    def prefetch(self, keys: Sequence[Key], in_use: Collection[Key]) -> None:
        """Start to load weights, as many as fit beside those in use."""
        spare = {*keys, *in_use}
        for key in keys:
            if key in self.kept:
                self.kept.move_to_end(key)
            elif self._make_room(self.size(key), spare):
                self._load(key)
            else:
                return

    def _load(self, key: Key) -> Loaded:
        loaded = self.stream.load(lambda: self.load(key))
        size = loaded.weight.nbytes
        if key[2] is None:
            self.counters.dense_bytes += size
        else:
            self.counters.unpacked += 1
            self.counters.unpacked_bytes += size
        if self.bytes + size <= self.limit:
            self.kept[key] = loaded
            self.bytes += size
            self.counters.peak_weight_bytes = max(self.counters.peak_weight_bytes, self.bytes)
        return loaded

    def _make_room(self, size: int, spare: Collection[Key]) -> bool:
        """Drop weights, but none of ``spare``, until ``size`` bytes fit; says whether they do."""
        while self.kept and self.bytes + size > self.limit:
            oldest = next(iter(self.kept))
            if oldest in spare:
                return False
            self.bytes -= self.kept.pop(oldest).weight.nbytes
        return self.bytes + size <= self.limit


class VariantBlocks:
    """The blocks of a model, run with a choice of levels for their units.

    Norms and biases stay loaded. The weights of linear layers, those of units and those that stay dense, come and go
    as there is room; those of modules that are dropped are not asked for.
    """

    def __init__(
        self,
        model: BlockwiseModel,
        units: Sequence[Unit],
        unpack: Unpack,
        limit: int,
        counters: Counters,
        read_ahead: ReadAhead | None = None,
    ) -> None:
        """Prepare the blocks.

        Args:
            model: with no block loaded.
            units: what has levels, ordered by block.
            unpack: gives the weight of a layer at a level.
            limit: bytes of weights that may be held.
            counters: counts what is unpacked and read.
            read_ahead: told what comes next, where the device does not load ahead by itself.
        """
        self.model, self.units, self.unpack, self.read_ahead = model, units, unpack, read_ahead
        self.units_of: list[list[int]] = [[] for _ in model.blocks]
        self.outer: dict[str, int] = {}
        """Units outside of the blocks, by layer (`EMBEDDING`, `HEAD`)."""
        for index, unit in enumerate(units):
            if unit.layer in OUTER:
                self.outer[unit.layer] = index
                continue
            for block in unit.blocks:
                self.units_of[block].append(index)
        self.tied = model.is_tied
        shapes = [{name: layer.weight.shape for name, layer in linear_layers(block).items()} for block in model.blocks]
        self.layers = [list(block) for block in shapes]
        self.stream = SideStream(model.device)

        def size(key: Key) -> int:
            """Bytes of a weight on the device."""
            shape = torch.Size([model.vocab_size, model.hidden_size]) if key[1] in OUTER else shapes[key[0]][key[1]]
            return shape.numel() * model.dtype.itemsize

        self.cache = WeightCache(self._load, size, limit, counters, self.stream)
        for block in range(len(model.blocks)):
            model.load_block(block, linear_weights=False)

    @contextmanager
    def passing(self, block: int, candidates: NDArray[np.int16]) -> Iterator[None]:
        """Enclose the work of a block; what ``candidates`` [C, units] need in the next one is got ready meanwhile."""
        following = self._needed(block + 1, candidates)
        if self.read_ahead and following and not self.stream.overlaps:
            variants = [(layer, level) for _, layer, level in following if level is not None]
            self.read_ahead(block + 1, variants)
        yield
        if self.stream.overlaps:
            self.stream.keep_pace()
            self.cache.prefetch(following, in_use=self._needed(block, candidates))

    def embed(self, levels: NDArray[np.int16], ids: Tensor) -> tuple[list[Tensor], NDArray[np.int64], BlockInputs]:
        """Hidden states before the first block of candidates with ``levels`` [C, units].

        Returns:
            States [S, L, H], the state of each candidate, [C], and what the blocks get beside them.
        """
        if EMBEDDING not in self.outer:
            hidden, inputs = self.model.embed(ids)
            return [hidden], np.zeros(len(levels), dtype=np.int64), inputs
        distinct, state_of = np.unique(levels[:, self.outer[EMBEDDING]], return_inverse=True)
        states = []
        for level in distinct.tolist():
            hidden, inputs = self.model.embed(ids, self._outer_weight(EMBEDDING, level))
            states.append(hidden)
        return states, state_of.reshape(-1), inputs

    def head(self, candidate: NDArray[np.int16]) -> Tensor | None:
        """Weight [V, H] of a candidate's head; None where it is the dense model's."""
        layer = EMBEDDING if self.tied else HEAD
        return self._outer_weight(layer, int(candidate[self.outer[layer]])) if layer in self.outer else None

    def _outer_weight(self, layer: str, level: int) -> Tensor | None:
        unit = self.units[self.outer[layer]]
        return None if level == DENSE_LEVEL else self.cache.weight((unit.block, layer, unit.levels[level].label))

    def run(self, block: int, levels: Sequence[int], hidden: Tensor, inputs: BlockInputs) -> Tensor:
        """Hidden states [N, L, H] after a block whose units are at ``levels``."""
        weights = {key[1]: self.cache.weight(key) for key in self._keys(block, levels)}
        return self.model.run_block(block, hidden, inputs, weights, self._absent(block, levels))

    def run_states(
        self, block: int, levels: Sequence[int], states: list[Tensor], inputs: BlockInputs, most_sequences: int
    ) -> list[Tensor]:
        """Each of ``states`` [S, L, H] after a block: as one batch, or one in pieces where it is too long for one."""
        sequences = len(states[0])
        if len(states) > 1:
            # Copies: a view would keep the whole batch in memory as long as any one state of it lives.
            return [part.clone() for part in self.run(block, levels, torch.cat(states), inputs).split(sequences)]
        if sequences <= most_sequences:
            return [self.run(block, levels, states[0], inputs)]
        pieces = states[0].split(most_sequences)
        return [torch.cat([self.run(block, levels, piece, inputs) for piece in pieces])]

    def gone(self, block: int, levels: Sequence[int]) -> bool:
        """Whether all modules of a block are dropped, so that hidden states pass it unchanged."""
        return self.model.gone(block, self._absent(block, levels))

    def _absent(self, block: int, levels: Sequence[int]) -> frozenset[str]:
        """Kinds of the modules of a block that are dropped."""
        return frozenset(
            kind
            for index, level in zip(self.units_of[block], levels, strict=True)
            if level != DENSE_LEVEL and self.units[index].levels[level].label == DROP
            for other, kind in self.units[index].modules
            if other == block
        )

    def _keys(self, block: int, levels: Sequence[int]) -> list[Key]:
        """Weights that a block needs: of each layer outside of dropped modules, at its level, or dense."""
        absent = self._absent(block, levels)
        chosen = {
            layer.layer: layer.levels[level].label
            for index, level in zip(self.units_of[block], levels, strict=True)
            if level != DENSE_LEVEL and not self.units[index].modules
            for layer in self.units[index].layers
        }
        layers = [layer for layer in self.layers[block] if not absent or module_kind(layer) not in absent]
        return [(block, layer, chosen.get(layer)) for layer in layers]

    def _needed(self, block: int, candidates: NDArray[np.int16]) -> list[Key]:
        """Every weight of a block that a candidate uses; none after the last block."""
        if block == len(self.units_of):
            return []
        rows = np.unique(candidates[:, self.units_of[block]], axis=0).tolist()
        return list(dict.fromkeys(key for levels in rows for key in self._keys(block, levels)))

    def _load(self, key: Key) -> Tensor:
        block, layer, level = key
        if level is not None:
            return self.unpack(block, layer, level)
        name = f"{self.model.block_names[block]}.{layer}.weight"
        weight = self.model.checkpoint.read([name], device=self.model.device, dtype=self.model.dtype)[name]
        # A view of the mapped file may be read again from disk whenever it is used: only a copy is held.
        return weight.clone() if weight.device.type == "cpu" else weight


class PackedWeights:
    """Unpacks variants on a device.

    They are held in host memory if all of them fit in ``limit`` bytes, each from its first use on; else they are read
    through the memory map of their files whenever they are unpacked. For an accelerator host memory is pinned, so that
    copies run beside its work.
    """

    def __init__(
        self,
        store: VariantStore | JointStore,
        device: torch.device,
        stored: torch.dtype,
        dtype: torch.dtype,
        limit: int,
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
