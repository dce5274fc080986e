"""Markdown that names and numbers cannot break out of."""

import re
from collections.abc import Sequence


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """GitHub-flavoured table with escaped cells."""
    lines = [columns, ["---"] * len(columns), *rows]
    cells = [line if number == 1 else [escape(cell) for cell in line] for number, line in enumerate(lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def escape(text: str) -> str:
    """Text as Markdown shows it literally, on one line."""
    return re.sub(r"([\\`*\[\]<>|#~&]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


def fenced(text: str, language: str) -> str:
    """A block of code whose fence is longer than any that stands in ``text`` (which ends with a line break)."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(4, longest + 1)
    return f"{fence}{language}\n{text}{fence}"
