"""A family, a method and two formats of one file: layers whose weights become their signs, or stay as they are.

At level `sign`, a row of weights becomes its signs times the mean of its absolute values; at level `dense`, nothing
changes. A search chooses which layers may stay dense.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from evopress.compression.base import Format, LayerMethod, Level, Variant
from evopress.compression.families import LayerFamily, level_map_caption
from evopress.compression.layers import LayerShape, sweep_bytes, sweep_operations
from evopress.util.errors import ArtifactError


class Signs(LayerFamily):
    """Share of the weights that stay dense, at most; a level costs the weights that it keeps so."""

    name = "signs"
    asked = "dense share"
    unit = "of the weights dense"
    column = ("dense", "of searched layers", 3)
    overhead = "scales"
    labels = "sign: one bit a weight; dense: as in the original"
    storage = "The weights are stored in the type of the original."
    level_map = level_map_caption("stay dense")

    def budget(self, target: float, parameters: int) -> int:
        """Most weights that stay dense."""
        return math.floor(Fraction(str(target)) * parameters)

    def average(self, cost: int, parameters: int) -> float:
        """Share of the weights that are dense."""
        return cost / parameters

    def title(self, average: float) -> str:
        """In per cent."""
        return f"with {average:.0%} of its weights dense"

    def bits(self, cost: int, parameters: int, dense_bytes: int) -> float:
        """One for a sign."""
        return (parameters - cost + cost * 8 * dense_bytes / parameters) / parameters


SIGNS = Signs()


class SignFormat(Format):
    """Parts: ``signs`` (uint8, a bit for each weight, lowest first, set where positive) and ``scales`` (float32)."""

    def __str__(self) -> str:
        return "sign"

    @classmethod
    def parse(cls, text: str) -> "SignFormat | None":
        """Read the name."""
        return cls() if text == "sign" else None

    def bytes(self, rows: int, columns: int) -> int:
        """Exact size of the parts."""
        return -(-rows * columns // 8) + 4 * rows

    def encode(self, weights: Tensor) -> dict[str, Tensor]:
        """Pack the signs of weights [rows, columns] with the mean absolute value of each row."""
        positive = (weights >= 0).flatten().to(torch.uint8)
        padded = torch.nn.functional.pad(positive, (0, -len(positive) % 8)).view(-1, 8)
        packed = (padded << torch.arange(8, device=padded.device)).sum(1).to(torch.uint8)
        return {"signs": packed.cpu(), "scales": weights.float().abs().mean(1).cpu()}

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Signs times scales."""
        signs, scales = parts.get("signs"), parts.get("scales")
        count = shape[0] * shape[1]
        if signs is None or scales is None or len(signs) != -(-count // 8) or len(scales) != shape[0]:
            raise ArtifactError(f"signs or scales do not fit weights {list(shape)}; delete the file and run again")
        bits = (signs[:, None] >> torch.arange(8, device=signs.device)).bitwise_and(1).flatten()[:count]
        return ((2.0 * bits - 1.0).view(shape) * scales[:, None]).to(dtype)


class DenseFormat(Format):
    """One part, ``weights``, as they are."""

    def __str__(self) -> str:
        return "dense"

    @classmethod
    def parse(cls, text: str) -> "DenseFormat | None":
        """Read the name."""
        return cls() if text == "dense" else None

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The part, after a look at its shape."""
        if "weights" not in parts or parts["weights"].shape != shape:
            raise ArtifactError(f"there are no weights {list(shape)}; delete the file and run again")
        return parts["weights"].to(dtype)


class MeanSign(LayerMethod):
    """The signs of a row's weights times their mean absolute value."""

    family = SIGNS
    method: Literal["mean_sign"] = "mean_sign"

    def labels(self) -> list[str]:
        """Signs alone, or all."""
        return ["sign", "dense"]

    def target_problems(self, target: float, where: str) -> Iterator[str]:
        """A target that is no share."""
        if target > 1:
            yield f"{where}.target: {target:g} is no share of the weights"

    def levels_of(self, layer: LayerShape) -> list[Level]:
        """Both."""
        dense = layer.parameters * layer.itemsize
        return [
            Level("sign", 0.0, 0, SignFormat().bytes(layer.rows, layer.columns)),
            Level("dense", 1.0, layer.parameters, dense),
        ]

    def compress(self, weights: Mapping[str, Tensor], hessian: Tensor, memory: float = math.inf) -> list[Variant]:
        """One layer after the other."""
        return [variant for layer, weight in weights.items() for variant in self._variants(layer, weight, hessian)]

    def _variants(self, layer: str, weight: Tensor, hessian: Tensor) -> Iterator[Variant]:
        dense, parameters = weight.float(), weight.numel()
        parts = SignFormat().encode(weight)
        change = SignFormat().decode(parts, (len(weight), weight.shape[1]), torch.float32).to(dense.device) - dense
        error = float(((change @ hessian) * change).sum() / ((dense @ hessian) * dense).sum())
        yield Variant(layer, "sign", 0.0, 0, parameters, "sign", parts, error, damping=0.0)
        whole = {"weights": weight.cpu().contiguous()}
        yield Variant(layer, "dense", 1.0, parameters, parameters, "dense", whole, error=0.0, damping=0.0)

    def peak_bytes(self, layers: Sequence[LayerShape], memory: float) -> int:
        """With the change of one layer in float32."""
        return sweep_bytes(layers, 4 * max(layer.parameters for layer in layers), factorizes=False)

    def operations(self, layers: Sequence[LayerShape]) -> float:
        """Of the errors."""
        return 2 * sweep_operations(layers, [2] * len(layers), factorizes=False)
