"""Sections of a model card: what was measured, on held-out text and in the runtime, and what was dropped.

In Markdown that names and numbers cannot break out of.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from evopress.artifacts.exports import read_export_manifest
from evopress.artifacts.paths import DENSE, GGUF, HUGGINGFACE, Run
from evopress.artifacts.tables import PERPLEXITY, RUNTIME, read_table
from evopress.compression.dropped import Dropped
from evopress.compression.size import Depth
from evopress.data.held_out import recorded_leaks
from evopress.export.base import Exporter
from evopress.models.modules import ATTENTION, KINDS, MLP
from evopress.util.metrics import with_error


def held_out_section(run: Run, search: str, exporter: Exporter) -> list[str]:
    """Title and table, and a warning where the text is not held out."""
    if not run.perplexity(search).exists():
        return ["## Held-out text", "Not measured yet."]
    measured = read_table(run.perplexity(search), PERPLEXITY).to_dict("records")
    original: dict[str, float] = {}
    if run.perplexity(DENSE).exists():
        table = read_table(run.perplexity(DENSE), PERPLEXITY)
        original = dict(zip(table["dataset"], table["perplexity"], strict=True))
    rows = [
        [
            str(row["dataset"]),
            f"{original[row['dataset']]:.4f}" if row["dataset"] in original else "-",
            f"{row['perplexity']:.4f}",
            with_error(row["kl"], row["kl_stderr"], 5),
            with_error(row["agreement"], row["agreement_stderr"], 4),
            f"{row['tokens']:,}",
        ]
        for row in measured
    ]
    columns = [
        "text",
        "perplexity, original",
        "perplexity, this model",
        "KL to the original (nats per token)",
        "agreement",
        "tokens",
    ]
    leaks = recorded_leaks(run, [str(row["dataset"]) for row in measured])
    title = "## Perplexity, on text that is not all held out" if leaks else "## Held-out text"
    same = exporter.exporter == HUGGINGFACE
    measured_on = [] if same else ["Measured on the same configuration in the layout and type of the original."]
    return [
        title,
        *measured_on,
        markdown_table(columns, rows),
        "Agreement is the share of tokens at which this model's most likely token is that of the original. ± is one "
        "standard error, over sequences of the text.",
        *(f"**Warning:** {escape(sentence)}." for sentence in leaks),
    ]


def runtime_section(run: Run, search: str, exporter: Exporter) -> list[str]:
    """What the file does in llama.cpp; nothing where this very file has not been measured."""
    if exporter.exporter != GGUF or not run.runtime(search).exists():
        return []
    measured = read_table(run.runtime(search), RUNTIME).to_dict("records")
    files = read_export_manifest(run, search, GGUF)["files"].values()
    if measured[0]["sha256"] not in [file["sha256"] for file in files]:
        return []
    file = measured[0]
    prompt, generation = (f"{file[f'{work}_speed']:,.1f} tokens/s" for work in ("prompt", "generation"))
    costs = [
        ["size of the file", f"{file['file_bytes'] / 1e6:,.1f} MB"],
        ["memory (weights, cache and buffers)", f"{file['resident_bytes'] / 1e6:,.1f} MB"],
        ["prompt", f"{prompt}, {file['prompt_ratio']:.2f} times as fast as the original in F16"],
        [
            "generation",
            f"{generation}, {file['generation_ratio']:.2f} times as fast",
        ],
    ]
    rows = [
        [
            str(row["dataset"]),
            f"{row['own_perplexity']:.4f}",
            f"{row['perplexity']:.4f}",
            f"{row['kl']:.5f}",
            f"{row['tokens']:,}",
        ]
        for row in measured
    ]
    texts = ["text", "perplexity, in float32", "perplexity, in llama.cpp", "KL between them (nats per token)", "tokens"]
    return [
        "## In llama.cpp",
        f"Measured with {file['runtime']} on a CPU with {file['threads']} threads. Speeds hold for that machine.",
        markdown_table(["", "value"], costs),
        "The runtime rounds what goes into quantized matrices to 8 bits, so its distribution differs a little from "
        "that of the same weights in float32:",
        markdown_table(texts, rows),
    ]


@dataclass(frozen=True)
class DepthFolder:
    """A folder that holds a model without some of its modules."""

    depth: Depth
    absent: Dropped
    """Dropped modules that the folder does not hold at all; the others give zeros."""
    stored: int | None
    """Parameters in the folder, if that can be told."""


def depth_title(dropped: Dropped) -> str:
    """What is dropped, as in `7 of 30 attention and 7 of 30 MLP modules`."""
    return (
        " and ".join(
            f"{dropped.count(kind)} of {dropped.total(kind)} {word}"
            for kind, word in ((ATTENTION, "attention"), (MLP, "MLP"))
        )
        + " modules"
    )


def depth_introduction(folder: DepthFolder) -> str:
    """What the folder holds of the dropped modules."""
    dropped = folder.depth.dropped
    words = ["The modules listed below were dropped: they add nothing to the hidden states."]
    gone = dropped.blocks - len(dropped.kept)
    if gone:
        words += [
            f"{_count(gone, 'block')} that lost both modules {_be(gone)} gone from this folder; later ones are "
            "renumbered, and `num_hidden_layers` is smaller."
        ]
    zeros = len(dropped.modules) - len(folder.absent.modules)
    if zeros:
        words += [
            f"{_count(zeros, 'module')} of blocks that keep the other one {_be(zeros)} still stored, with an output "
            "projection of zeros: the numbers are exact, but memory and time of these modules are not saved."
        ]
    return " ".join(words)


def depth_size_rows(folder: DepthFolder) -> list[list[str]]:
    """Rows of the table of sizes: modules, parameters and cache."""
    depth, dropped = folder.depth, folder.depth.dropped
    attention, saved = dropped.total(ATTENTION), folder.absent.count(ATTENTION)
    return [
        ["attention modules dropped", f"{dropped.count(ATTENTION)} of {attention}"],
        ["MLP modules dropped", f"{dropped.count(MLP)} of {dropped.total(MLP)}"],
        ["blocks in this folder", f"{len(dropped.kept)} of {dropped.blocks}"],
        ["parameters of the original", f"{depth.parameters:,}"],
        ["parameters in use", f"{depth.in_use:,} ({depth.in_use / depth.parameters:.1%})"],
        *([["parameters stored in this folder", f"{folder.stored:,}"]] if folder.stored is not None else []),
        ["key-value cache saved here", f"{saved / max(1, attention):.1%} ({saved} of {attention} attention modules)"],
    ]


def modules_table(folder: DepthFolder) -> str:
    """Markdown table of the blocks that lost a module, with their numbers in the folder."""
    dropped = folder.depth.dropped
    rows = []
    for block in sorted({block for block, _ in dropped.modules}):
        number = str(dropped.kept.index(block)) if block in dropped.kept else "-"
        rows.append([str(block), number, *(_state(folder, (block, kind)) for kind in KINDS)])
    return markdown_table(["block of the original", "block here", "attention", "MLP"], rows)


def _state(folder: DepthFolder, module: tuple[int, str]) -> str:
    if module in folder.absent.modules:
        return "dropped"
    return "dropped (zeros)" if module in folder.depth.dropped.modules else "kept"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _be(number: int) -> str:
    return "is" if number == 1 else "are"


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
