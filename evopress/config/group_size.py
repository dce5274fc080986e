"""Which group sizes a layer can have."""

import math
from collections.abc import Iterable

from evopress.util.errors import CompressionError


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
