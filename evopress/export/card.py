"""The model card of a compressed model: README.md with the YAML header that the Hugging Face hub reads.

It is a stage of its own, after evaluation, so that the card holds measured numbers and a change of its wording
makes no model again.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from evopress.artifacts.atomic import write_bytes, write_text
from evopress.artifacts.exports import read_export_manifest, recorded_polish, weights_bytes
from evopress.artifacts.model_facts import ModelFacts, read_model_facts
from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import versions
from evopress.artifacts.tables import settings_of
from evopress.compression.families import MODULES, LayerFamily
from evopress.compression.size import Size, dense_size, size_of
from evopress.config.base import to_yaml
from evopress.config.context import StageContext
from evopress.config.evaluation import CardFacts
from evopress.export.base import Exporter
from evopress.export.card_sections import (
    DepthFolder,
    depth_introduction,
    depth_size_rows,
    depth_title,
    escape,
    fenced,
    held_out_section,
    markdown_table,
    modules_table,
    runtime_section,
)
from evopress.export.level_map import level_png, shown_levels
from evopress.models.checkpoint import Checkpoint
from evopress.models.modules import OUTER
from evopress.search.configuration import Configuration
from evopress.search.strategies import STRATEGIES
from evopress.search.target import megabytes, target_text
from evopress.util.errors import ConfigError

NOTHING_TOLD = CardFacts()
_IN_SEQUENCE = (
    "The model was polished: once the levels were chosen, the layers were compressed to them once more, block after "
    "block, with inputs from the compressed blocks before"
)
POLISHED = {
    "sequential": f"{_IN_SEQUENCE}.",
    "asymmetric": f"{_IN_SEQUENCE}, to give what the layers of the original give for its own inputs "
    "([GPTAQ](https://arxiv.org/abs/2504.02692)).",
}
"""What the card says of a polish."""


def write_card(context: StageContext, search: str, exporter: Exporter, settings: CardFacts = NOTHING_TOLD) -> None:
    """Write README.md and the picture of the levels into the folder of an export.

    What held-out text tells is in the card if it has been measured.

    Raises:
        ArtifactError: the export, its configuration or a table is missing, damaged or of another model.
    """
    run = context.run
    read_export_manifest(run, search, exporter.exporter)
    write_bytes(run.level_map(search, exporter.exporter), level_png(Configuration.read(run, search).table))
    write_text(run.card(search, exporter.exporter), render_card(run, search, exporter, settings))


def render_card(run: Run, search: str, exporter: Exporter, settings: CardFacts) -> str:
    """Text of the card.

    Args:
        run: of the run.
        search: name of the search.
        exporter: wrote the folder that the card lies in.
        settings: what the user has to say.

    Raises:
        ArtifactError: as `write_card`.
    """
    facts = read_model_facts(run)
    configuration = Configuration.read(run, search).table
    searched = settings_of(run.configuration(search))
    polish = recorded_polish(run, search, exporter.exporter)
    checkpoint = Checkpoint(run.model)
    size, dense = size_of(run, configuration), dense_size(checkpoint, configuration)
    folder = run.export(search, exporter.exporter)
    lost = _without_modules(size, folder, exporter)
    sections = [
        header(facts, exporter.library, None if lost else exporter.relation, settings),
        f"# {escape(facts.name)} {_title(size)}",
        *_introduction(facts, search, searched, size, lost, exporter),
        f"![Level of every layer, one column a block]({run.level_map(search, exporter.exporter).name})",
        *([POLISHED[polish]] if polish in POLISHED else []),
        "## Usage",
        exporter.usage(folder.as_posix()),
        f"`{folder.as_posix()}` is where this folder was written; give the path of your copy.",
        "## Files",
        _files_section(run, search, exporter),
        "## Size",
        _size_section(size, dense, searched, lost, _folder_rows(run, search, exporter, checkpoint)),
        *held_out_section(run, search, exporter),
        *runtime_section(run, search, exporter),
        *_levels_sections(configuration, size, lost),
        "## Settings",
        _settings_section(run, search, configuration, polish),
        "## Versions",
        ", ".join(f"{name} {number}" for name, number in versions().items()),
    ]
    return "\n\n".join(sections) + "\n"


def _without_modules(size: Size, folder: Path, exporter: Exporter) -> DepthFolder | None:
    """What the folder holds of a model that lost modules; None where none was dropped."""
    if size.depth is None:
        return None
    stored = sum(Checkpoint(folder).elements().values()) if any(folder.glob("*.safetensors")) else None
    return DepthFolder(size.depth, exporter.absent(size.depth.dropped), stored)


def header(
    facts: ModelFacts,
    library: str = "transformers",
    relation: str | None = "quantized",
    settings: CardFacts = NOTHING_TOLD,
) -> str:
    """YAML header with the keys of the hub's model cards.

    Args:
        facts: of the original.
        library: what loads the compressed model.
        relation: to the original, if the hub has a word for it.
        settings: what the user has to say.
    """
    known: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["evopress", "compressed"],
        **facts.card,
    }
    if base := settings.base_model or facts.hub_id:
        known |= {"base_model": base, "base_model_relation": relation}
    elif relation is None:
        known["base_model_relation"] = None
    known["quantized_by"] = settings.quantized_by
    told = {key: value for key, value in known.items() if value is not None}
    return f"---\n{to_yaml(told, sort=True)}---"


def levels_table(configuration: pd.DataFrame) -> str:
    """Markdown table of levels, one row a block, one column a layer; a layer without any stays as it was."""
    shown = shown_levels(configuration)
    inside = shown[~shown["layer"].isin(OUTER)]
    levels = inside.pivot(index="block", columns="layer", values="level")
    levels = levels[list(dict.fromkeys(inside["layer"]))]
    rows = [[str(block), *("-" if pd.isna(level) else str(level) for level in row)] for block, row in levels.iterrows()]
    return markdown_table(["block", *levels.columns], rows)


def _title(size: Size) -> str:
    words = [size.family.title(size.average)] if size.family else []
    if size.depth:
        words += [f"without {depth_title(size.depth.dropped)}"]
    return " ".join(words)


def _levels_sections(configuration: pd.DataFrame, size: Size, lost: DepthFolder | None) -> list[str]:
    """Tables of what was chosen: of modules, of layers, or both."""
    sections = []
    if lost:
        sections += ["## Dropped modules", "Blocks that are not listed are whole.", modules_table(lost)]
    if size.family:
        sections += ["## Levels", f"The level of each linear layer ({size.family.labels}), by block."]
        sections += [levels_table(configuration)]
        outer = configuration[configuration["layer"].isin(OUTER)].to_dict("records")
        told = ", ".join(f"`{row['unit']}` {row['level']}" for row in outer)
        sections += [f"Outside of the blocks: {told}."] if told else []
    return sections


def _chosen_by(settings: Mapping[str, Any]) -> str:
    """End of a sentence on levels, or on dropped modules: what a search with these settings did."""
    try:
        return STRATEGIES.parse(settings, "search").sentence()
    except ConfigError:  # a strategy from outside of the package, or settings of another release
        return f"found by the strategy {settings.get('strategy')}"


def _introduction(
    facts: ModelFacts, search: str, settings: dict[str, Any], size: Size, lost: DepthFolder | None, exporter: Exporter
) -> list[str]:
    origin = escape(facts.origin)
    if facts.hub_id:
        origin = f"[{escape(facts.hub_id)}](https://huggingface.co/{quote(facts.hub_id)})"
    what = (size.family or MODULES).introduction
    texts = [f"A compressed version of {origin}. {what}{_chosen_by(settings)} (search `{search}`)."]
    if lost:
        texts += [depth_introduction(lost)]
    if size.family:
        packed = "The packed size below is what the same numbers take with each layer stored at its level."
        texts += [f"{exporter.storage(size.family)} {packed}".lstrip()]
    return texts


def _files_section(run: Run, search: str, exporter: Exporter) -> str:
    """Table of the files beside the card, the largest first."""
    files = read_export_manifest(run, search, exporter.exporter)["files"]
    sizes = sorted(((int(facts["bytes"]), name) for name, facts in files.items()), key=lambda size: (-size[0], size[1]))
    return markdown_table(["file", "size"], [[name, megabytes(size)] for size, name in sizes])


def _folder_rows(run: Run, search: str, exporter: Exporter, checkpoint: Checkpoint) -> list[list[str]]:
    """What the weights of the folder take as they are; nothing where it holds none."""
    stored = weights_bytes(run, search, exporter.exporter, exporter.weights)
    if not stored:
        return []
    parameters = sum(checkpoint.elements().values())
    return [
        ["weight files in this folder", megabytes(stored)],
        ["the same in bits per parameter of the original", f"{8 * stored / parameters:.4g}"],
    ]


def _asked(target: Any, family: LayerFamily) -> str:
    """What the target of a search over layers is of."""
    if not isinstance(target, Mapping):
        return f"{family.asked} asked (compressed layers)"
    file = target.get("file")
    return f"size asked of the export {file['exporter']}" if isinstance(file, Mapping) else "packed size asked"


def _size_section(
    size: Size, dense: Size, settings: dict[str, Any], lost: DepthFolder | None, folder: list[list[str]]
) -> str:
    asked = target_text(settings.get("target"))
    rows: list[list[str]] = depth_size_rows(lost) if lost else []
    if size.family:
        rows += [
            [_asked(settings.get("target"), size.family), asked],
            [f"{size.family.asked} reached", f"{size.average:.4f}"],
            [f"bits per weight with {size.family.overhead}", f"{size.bits_with_overhead:.4f}"],
        ]
    else:
        rows = [[f"{MODULES.asked} to drop, as asked", asked], *rows]
    rows += [
        ["bits per weight of the original", f"{dense.bits:.4g}"],
        *folder,
        [(size.family or MODULES).size, f"{size.total_bytes / 1e6:,.1f} MB"],
        ["size of the original", f"{dense.total_bytes / 1e6:,.1f} MB"],
    ]
    return markdown_table(["", "value"], rows)


def _settings_section(run: Run, search: str, configuration: pd.DataFrame, polish: str) -> str:
    """Settings that made the configuration and its variants, as the artifacts themselves record them."""
    made: dict[str, Any] = {"search": settings_of(run.configuration(search)) | {"polish": polish}}
    for name, table in Configuration(configuration).made_by(run):
        made.setdefault("variants", {})[name] = settings_of(table)
    return fenced(to_yaml(made), "yaml")
