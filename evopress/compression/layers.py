"""Linear layers as the model's config alone tells of them, and what it takes to go once over their columns."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evopress.util.errors import CompressionError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class LayerShape:
    """A linear layer, known from the model's config alone."""

    name: str
    """In the model, as in `model.layers.0.self_attn.q_proj`."""
    block: int
    layer: str
    """Name inside the block."""
    input_group: str
    """Layer inside the block whose input this one shares."""
    rows: int
    columns: int
    itemsize: int
    """Bytes of a dense weight."""

    @property
    def parameters(self) -> int:
        """Weights of the layer."""
        return self.rows * self.columns


def layer_shapes(layers: "pd.DataFrame", itemsize: int) -> list[LayerShape]:
    """Linear layers of a table with the LAYERS schema; ``itemsize`` is that of their dense weights."""
    return [
        LayerShape(
            name=row["name"],
            block=int(row["block"]),
            layer=row["layer"],
            input_group=row["input_group"],
            rows=int(row["rows"]),
            columns=int(row["columns"]),
            itemsize=itemsize,
        )
        for row in layers.to_dict("records")
    ]


def sweep_bytes(layers: Sequence[LayerShape], panel: float, *, factorizes: bool, passes: int = 0) -> int:
    """Most bytes that a method holds which goes over the columns of layers with the same input.

    Args:
        layers: given as dense weights, of which a float32 copy is made beside the Hessian.
        panel: bytes of what it works on.
        factorizes: whether it takes a Cholesky factor: the Hessian reordered and reversed, and the factor in float64,
            of which a float32 copy stays.
        passes: further ones (`descent`), for which the reordered Hessian stays, and a copy of it.
    """
    columns, weights = layers[0].columns, sum(layer.parameters for layer in layers)
    factor = (4 + 4 + 8) * columns**2 if factorizes else 0
    stays = (3 if passes else 1) * factor / 4
    return int(8 * weights + 4 * columns**2 + max(factor, panel + stays))


def sweep_operations(
    layers: Sequence[LayerShape], levels: Sequence[int], *, factorizes: bool, passes: int = 0, refits: float = 0
) -> float:
    """Multiplications and additions of such a method that gives each layer so many ``levels``.

    Args:
        layers: with the same input.
        levels: of each layer.
        factorizes: whether it takes a Cholesky factor.
        passes: after the first.
        refits: numbers that each group of inputs has, and that are fitted anew before each of them.
    """
    columns = layers[0].columns
    total = 2.0 * columns * sum(layer.parameters for layer in layers)  # energy, for the relative error
    if factorizes:
        again = passes * (3 + 2 * refits) + (2 if passes else 0)  # products with the Hessian, a sweep; the error
        variants = sum(count * layer.parameters for count, layer in zip(levels, layers, strict=True))
        total += columns * variants * (1 + again) + columns**3 / 3
    return total


def check_group_size(group_size: int | None, columns: int, other_columns: Iterable[int] = ()) -> int:
    """Inputs per group of a layer with ``columns`` inputs.

    Raises:
        CompressionError: it does not divide ``columns``; the message offers the nearest sizes that do, and that divide
            ``other_columns`` as well, where there are such.
    """
    if group_size is None:
        return columns
    if columns % group_size == 0:
        return group_size
    common = math.gcd(columns, *other_columns)
    divided = common if common > 1 else columns
    divisors = [d for d in range(1, divided + 1) if divided % d == 0]
    near = sorted({max(d for d in divisors if d < group_size), min((d for d in divisors if d > group_size), default=1)})
    offers = " or ".join(str(d) for d in near if d > 1) or str(columns)
    raise CompressionError(
        f"group_size {group_size} does not divide the {columns} input features; {offers} does, null is one per channel"
    )
