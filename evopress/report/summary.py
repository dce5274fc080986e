"""The comparison as plain text, for the end of a run on a terminal."""

from collections.abc import Sequence
from pathlib import Path

from evopress.artifacts.paths import Run
from evopress.report.comparison import Column, Comparison

WIDTH = 100


def summary(
    comparison: Comparison,
    run: Run,
    title: str,
    exports: Sequence[Path],
    leaks: Sequence[str] = (),
    runtime: Comparison | None = None,
) -> str:
    """Title, comparison table, and where the models and the report lie; no table line is longer than WIDTH.

    ``exports`` are folders of models, ``leaks`` sentences on text that is not held out, and ``runtime`` compares files
    in llama.cpp.
    """
    lines = [title, ""]
    for table in tables(comparison):
        lines += [table, ""]
    if any(comparison.is_best(model, column) for model in comparison.rows for column in comparison.columns):
        lines += ["* better than every other compressed model, by more than the standard error of the difference", ""]
    if runtime is not None and runtime.rows:
        lines += ["GGUF files in llama.cpp", ""]
        for table in tables(runtime):
            lines += [table, ""]
    for sentence in leaks:
        lines += [f"Warning: {sentence}", ""]
    places = {f"{folder.parent.name} as {folder.name}": folder for folder in exports} | {"report": run.report}
    width = max(map(len, places))
    lines += [f"{name:<{width}}  {path}" for name, path in places.items()]
    return "\n".join(lines) + "\n"


def tables(comparison: Comparison) -> list[str]:
    """The comparison in as many tables as it takes for no line to be longer than WIDTH."""
    return ["\n".join(_table(comparison, columns)) for columns in _fit(comparison)]


def _fit(comparison: Comparison) -> list[list[Column]]:
    """Cut the columns into tables that are no wider than WIDTH, each of at least one column."""
    tables: list[list[Column]] = []
    first = max(map(len, ["model", *comparison.rows]))
    filled = 0
    for column in comparison.columns:
        width = 2 + max(map(len, _cells(comparison, column)))
        if not tables or filled + width > WIDTH:
            tables.append([])
            filled = first
        tables[-1].append(column)
        filled += width
    return tables


def _table(comparison: Comparison, columns: Sequence[Column]) -> list[str]:
    """Two lines of header, a rule, and a line for each model; numbers aligned by their last digit."""
    names = ["", "model", *comparison.rows]
    width = max(map(len, names))
    texts = [_cells(comparison, column) for column in columns]
    widths = [max(map(len, text)) for text in texts]
    lines = []
    for number, name in enumerate(names):
        cells = (f"  {text[number]:>{size}}" for text, size in zip(texts, widths, strict=True))
        lines.append(f"{name:<{width}}{''.join(cells)}".rstrip())
    return [*lines[:2], "-" * (width + sum(widths) + 2 * len(widths)), *lines[2:]]


def _cells(comparison: Comparison, column: Column) -> list[str]:
    """Header lines and values of a column; a star marks the best, a blank keeps the others in line."""
    values = [
        comparison.text(model, column) + ("*" if comparison.is_best(model, column) else " ")
        for model in comparison.rows
    ]
    return [f"{column.title} ", f"{column.subtitle} ", *values]
