"""The plan as plain text."""

import math
from collections.abc import Callable, Mapping, Sequence

from evopress.plan.searches import SearchWork
from evopress.plan.shape import ModelShape
from evopress.plan.stages import Stage

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


def describe_model(shape: ModelShape) -> str:
    """One line on the model."""
    source = "" if shape.source is None else f", from a quantized file of {amount(shape.source, 'B')}"
    return (
        f"{shape.architecture}: {amount(shape.outside + shape.inside)} parameters in {shape.blocks} blocks with "
        f"{len(shape.layers)} linear layers, {amount(shape.bytes, 'B')} in {str(shape.dtype).removeprefix('torch.')}"
        + source
    )


def stage_table(stages: Sequence[Stage]) -> str:
    """One row for each stage, and the totals; where a part is unknown, they are the least it can be."""
    rows = [["stage", "jobs", "memory", "disk", "tokens", "operations", ""]]
    for stage in stages:
        sizes = [amount(stage.memory, "B"), amount(stage.disk, "B"), amount(stage.tokens), amount(stage.flops, "FLOP")]
        rows.append([stage.name, str(stage.jobs), *sizes, stage.note])
    disk, flops = ([getattr(stage, name) for stage in stages] for name in ("disk", "flops"))
    peak = max((stage.memory for stage in stages if not math.isnan(stage.memory)), default=0.0)
    jobs = str(sum(stage.jobs for stage in stages))
    rows.append(["total", jobs, amount(peak, "B") + " peak", _total(disk, "B"), "", _total(flops, "FLOP"), ""])
    return columns(rows)


def _total(values: Sequence[float], unit: str) -> str:
    known = [value for value in values if not math.isnan(value)]
    return ("" if len(known) == len(values) else ">= ") + amount(sum(known), unit)


def search_table(title: str, works: Mapping[str, SearchWork]) -> str:
    """Facts of a search, with one column for each device.

    Args:
        title: first cell.
        works: by the name of the device.
    """
    rows = [[title, *works, ""]]
    for label, fact in _FACTS.items():
        rows.append([f"  {label}", *(fact(work) for work in works.values()), ""])
    return columns(rows)


def _weights(work: SearchWork) -> str:
    return f"{amount(work.working_set, 'B')}, {'kept' if work.kept else 'streamed'}"


_FACTS: dict[str, Callable[[SearchWork], str]] = {
    "weights that candidates use": _weights,
    "memory on the device": lambda work: amount(work.memory_bytes, "B"),
    "  of which hidden states": lambda work: amount(work.state_bytes, "B"),
    "dense model: hidden states, on the host": lambda work: amount(work.dense_bytes, "B"),
    "share of block work, by shared prefixes": lambda work: f"{100 * work.share:.0f} %",
    "passes through all blocks / round": lambda work: f"{work.a_round.passes:.0f}",
    "tokens evaluated / round": lambda work: amount(work.a_round.candidate_tokens),
    "tokens x blocks / round": lambda work: amount(work.a_round.block_tokens),
    "tokens through the head / round": lambda work: amount(work.a_round.head_tokens),
    "weights unpacked / round": lambda work: amount(work.a_round.unpacked_bytes, "B"),
    "operations / round": lambda work: amount(work.a_round.flops, "FLOP"),
    "operations before the first": lambda work: amount(work.before.flops, "FLOP"),
}
