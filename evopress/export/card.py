"""The model card of a compressed model: README.md with the YAML header that the Hugging Face hub reads.

It is a stage of its own, after evaluation, so that the card holds measured numbers and a change of its wording
makes no model again.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from evopress.artifacts.atomic import write_text
from evopress.artifacts.exports import read_export_manifest, recorded_polish, weights_bytes
from evopress.artifacts.model_facts import ModelFacts, read_model_facts
from evopress.artifacts.paths import DENSE, GGUF, HUGGINGFACE, Run
from evopress.artifacts.tables import PERPLEXITY, RUNTIME, read_table, settings_of
from evopress.compression.families import MODULES, LayerFamily, of_modules
from evopress.compression.size import Size, dense_size, size_of
from evopress.config.context import StageContext
from evopress.data.held_out import recorded_leaks
from evopress.export.base import Exporter
from evopress.export.depth_card import DepthFolder, depth_introduction, depth_size_rows, depth_title, modules_table
from evopress.export.markdown import escape, fenced, markdown_table
from evopress.models.checkpoint import Checkpoint
from evopress.models.modules import OUTER
from evopress.search.configuration import Configuration
from evopress.search.strategies import STRATEGIES
from evopress.search.target import megabytes, target_text
from evopress.util.errors import ConfigError
from evopress.util.versions import versions
from evopress.util.yaml_text import to_yaml

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


def write_card(context: StageContext, search: str, exporter: Exporter) -> None:
    """Write README.md into the folder of an export; perplexity is told if it has been measured.

    Raises:
        ArtifactError: the export, its configuration or a table is missing, damaged or of another model.
    """
    run = context.run
    read_export_manifest(run, search, exporter.exporter)
    write_text(run.card(search, exporter.exporter), render_card(run, search, exporter))


def render_card(run: Run, search: str, exporter: Exporter) -> str:
    """Text of the card.

    Args:
        run: of the run.
        search: name of the search.
        exporter: wrote the folder that the card lies in.

    Raises:
        ArtifactError: as `write_card`.
    """
    facts = read_model_facts(run)
    configuration = Configuration.read(run, search).table
    settings = settings_of(run.configuration(search))
    polish = recorded_polish(run, search, exporter.exporter)
    checkpoint = Checkpoint(run.model)
    size, dense = size_of(run, configuration), dense_size(checkpoint, configuration)
    folder = run.export(search, exporter.exporter)
    lost = _without_modules(size, folder, exporter)
    sections = [
        header(facts, exporter.library, None if lost else exporter.relation),
        f"# {escape(facts.name)} {_title(size)}",
        *_introduction(facts, search, settings, size, lost, exporter),
        *([POLISHED[polish]] if polish in POLISHED else []),
        "## Usage",
        exporter.usage(folder.as_posix()),
        "## Size",
        _size_section(size, dense, settings, lost, _folder_rows(run, search, exporter, checkpoint)),
        *_perplexity_section(run, search, exporter),
        *_runtime_section(run, search, exporter),
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


def header(facts: ModelFacts, library: str = "transformers", relation: str | None = "quantized") -> str:
    """YAML header with the keys of the hub's model cards.

    Args:
        facts: of the original.
        library: what loads the compressed model.
        relation: to the original, if the hub has a word for it.
    """
    known: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["evopress", "compressed"],
        **facts.card,
    }
    if facts.hub_id:
        known |= {"base_model": facts.hub_id} | ({"base_model_relation": relation} if relation else {})
    return f"---\n{to_yaml(known, sort=True)}---"


def levels_table(configuration: pd.DataFrame) -> str:
    """Markdown table of levels, one row a block, one column a layer."""
    inside = configuration[~configuration["layer"].isin(OUTER)]
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
        sections += [levels_table(configuration[~of_modules(configuration)])]
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


def _perplexity_section(run: Run, search: str, exporter: Exporter) -> list[str]:
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
            f"{row['kl']:.5f}",
            f"{row['tokens']:,}",
        ]
        for row in measured
    ]
    columns = [
        "text",
        "perplexity, original",
        "perplexity, this model",
        "KL to the original (nats per token)",
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
        *(f"**Warning:** {escape(sentence)}." for sentence in leaks),
    ]


def _runtime_section(run: Run, search: str, exporter: Exporter) -> list[str]:
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


def _settings_section(run: Run, search: str, configuration: pd.DataFrame, polish: str) -> str:
    """Settings that made the configuration and its variants, as the artifacts themselves record them."""
    made: dict[str, Any] = {"search": settings_of(run.configuration(search)) | {"polish": polish}}
    for name, table in Configuration(configuration).made_by(run):
        made.setdefault("variants", {})[name] = settings_of(table)
    return fenced(to_yaml(made), "yaml")
