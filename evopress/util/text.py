"""Amounts and tables as plain text."""

import math
from collections.abc import Sequence

_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")


def amount(value: float, unit: str = "") -> str:
    """Three digits with a decimal prefix, as in `13.5 GB`; `?` where it is not known."""
    if math.isnan(value):
        return "?"
    power = min(len(_PREFIXES) - 1, max(0, int(math.log10(value) // 3))) if value >= 1 else 0
    number = value / 1000**power
    if power + 1 < len(_PREFIXES) and number >= 999.5:  # would be rounded up to the next prefix
        power, number = power + 1, 1.0
    digits = 2 - int(math.log10(number)) if power else 0
    return f"{number:.{digits}f} {_PREFIXES[power]}{unit}".rstrip()


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns: the first and the last to the left, numbers between them to the right."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    last = len(widths) - 1
    lines = [
        "  ".join(
            cell.ljust(width) if index in (0, last) else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
