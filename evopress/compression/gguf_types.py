"""The types of GGUF files in which a weight can be stored: sizes, grids, and where each integer lies in a block.

A row of a weight is cut into blocks of 32 or 256 weights. The types with a `GgufGrid` stand for weights
``d scale value(code) - dmin minimum``, where d and dmin are float16 numbers of the block, and scales and minima small
integers of groups within it. The other types choose vectors from codebooks, and only have their sizes here.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from evopress.util.errors import CompressionError


@dataclass(frozen=True)
class Plane:
    """Where some bits of each of a block's integers lie; planes of the same integers are named low bits first.

    The byte at ``start + chunk * stride + i`` holds, from its lowest bits on, those of the integers
    ``(chunk * 8 / bits + k) * stride + i`` for k = 0, 1, and so on. A plane of 8 bits holds two's complement: it reads
    as the number plus 128.
    """

    start: int
    bits: int
    stride: int


@dataclass(frozen=True)
class GgufGrid:
    """How a type stores what its weights are made of."""

    group: int
    """Weights that share a scale and a minimum."""
    values: tuple[int, ...]
    """What the codes stand for, rising."""
    codes: tuple[Plane, ...]
    step: int
    """Where d lies in the block."""
    offset: int | None = None
    """Where the float16 number lies that belongs to the minima; None if the grid has no minima."""
    scales: tuple[Plane, ...] = ()
    """The scales of all groups, followed by their minima where the grid has some; empty if each group is a block."""
    scale_values: tuple[int, int] = (1, 1)
    """Lowest and highest scale."""
    interleaved: bool = False
    """Whether scales and minima are 6-bit integers in the 12 bytes that Q4_K and Q5_K share, which no planes hold."""

    @property
    def is_linear(self) -> bool:
        """Whether values are neighbouring integers."""
        return self.values[-1] - self.values[0] == len(self.values) - 1

    @property
    def is_nested(self) -> bool:
        """Whether the groups of a block have scales of their own."""
        return self.scale_values != (1, 1)


@dataclass(frozen=True)
class GgufType:
    """A type of GGUF files."""

    name: str
    block: int
    """Weights of a block; they belong to one row."""
    bytes: int
    """Of a block."""
    grid: GgufGrid | None = None
    """None where the weights come from codebooks."""

    @property
    def bits(self) -> float:
        """Bits per weight, everything included."""
        return 8 * self.bytes / self.block

    def row_bytes(self, columns: int) -> int:
        """Exact size of a row.

        Raises:
            CompressionError: rows of so many columns are no whole blocks.
        """
        if columns < 1 or columns % self.block:
            raise CompressionError(f"{self.name} needs rows of whole blocks of {self.block} weights, not of {columns}")
        return columns // self.block * self.bytes


def _integers(lowest: int, count: int) -> tuple[int, ...]:
    return tuple(range(lowest, lowest + count))


_NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_TYPES = (
    GgufType("Q4_0", 32, 18, GgufGrid(32, _integers(-8, 16), (Plane(2, 4, 16),), step=0)),
    GgufType("Q4_1", 32, 20, GgufGrid(32, _integers(0, 16), (Plane(4, 4, 16),), step=0, offset=2)),
    GgufType("Q5_0", 32, 22, GgufGrid(32, _integers(-16, 32), (Plane(6, 4, 16), Plane(2, 1, 1)), step=0)),
    GgufType("Q5_1", 32, 24, GgufGrid(32, _integers(0, 32), (Plane(8, 4, 16), Plane(4, 1, 1)), step=0, offset=2)),
    GgufType("Q8_0", 32, 34, GgufGrid(32, _integers(-128, 256), (Plane(2, 8, 32),), step=0)),
    GgufType(
        "Q2_K",
        256,
        84,
        GgufGrid(
            16,
            _integers(0, 4),
            (Plane(16, 2, 32),),
            step=80,
            offset=82,
            scales=(Plane(0, 4, 16),),
            scale_values=(0, 15),
        ),
    ),
    GgufType(
        "Q3_K",
        256,
        110,
        GgufGrid(
            16,
            _integers(-4, 8),
            (Plane(32, 2, 32), Plane(0, 1, 32)),
            step=108,
            scales=(Plane(96, 4, 8), Plane(104, 2, 4)),
            scale_values=(-32, 31),
        ),
    ),
    GgufType(
        "Q4_K",
        256,
        144,
        GgufGrid(32, _integers(0, 16), (Plane(16, 4, 32),), step=0, offset=2, scale_values=(0, 63), interleaved=True),
    ),
    GgufType(
        "Q5_K",
        256,
        176,
        GgufGrid(
            32,
            _integers(0, 32),
            (Plane(48, 4, 32), Plane(16, 1, 32)),
            step=0,
            offset=2,
            scale_values=(0, 63),
            interleaved=True,
        ),
    ),
    GgufType(
        "Q6_K",
        256,
        210,
        GgufGrid(
            16,
            _integers(-32, 64),
            (Plane(0, 4, 64), Plane(128, 2, 32)),
            step=208,
            scales=(Plane(192, 8, 16),),
            scale_values=(-128, 127),
        ),
    ),
    GgufType("IQ4_NL", 32, 18, GgufGrid(32, _NONLINEAR, (Plane(2, 4, 16),), step=0)),
    GgufType(
        "IQ4_XS",
        256,
        136,
        GgufGrid(
            32,
            _NONLINEAR,
            (Plane(8, 4, 16),),
            step=0,
            scales=(Plane(4, 4, 1), Plane(2, 2, 1)),
            scale_values=(-32, 31),
        ),
    ),
    GgufType("IQ1_M", 256, 56),
    GgufType("IQ2_XXS", 256, 66),
    GgufType("IQ2_XS", 256, 74),
    GgufType("IQ2_S", 256, 82),
    GgufType("IQ3_XXS", 256, 98),
    GgufType("IQ3_S", 256, 110),
)
GGUF_TYPES = {kind.name: kind for kind in _TYPES}
"""By their names in the GGUF specification."""


def possible_types(names: Iterable[str], columns: int) -> list[GgufType]:
    """Those of the named types that rows of so many columns can have, by rising size.

    Raises:
        CompressionError: there are none.
    """
    kinds = [GGUF_TYPES[name] for name in names]
    possible = [kind for kind in kinds if columns % kind.block == 0]
    if not possible:
        blocks = sorted({kind.block for kind in kinds})
        raise CompressionError(
            f"none of {', '.join(kind.name for kind in kinds)} can hold rows of {columns} weights: they have blocks of "
            f"{' or '.join(map(str, blocks))}; "
            + ("name a type with blocks of 32, as Q4_0, or exclude the layer" if columns % 32 == 0 else "exclude it")
        )
    return sorted(possible, key=lambda kind: kind.bits)
