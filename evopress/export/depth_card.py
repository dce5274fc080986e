"""What the model card says of modules that were dropped."""

from dataclasses import dataclass

from evopress.compression.dropped import Dropped
from evopress.compression.size import Depth
from evopress.export.markdown import markdown_table
from evopress.models.modules import ATTENTION, KINDS, MLP


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
