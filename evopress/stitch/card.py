"""The model card of a compressed model: README.md with the YAML header that the Hugging Face hub reads.

It is a stage of its own, after evaluation, so that the card holds measured numbers and a change of its wording
makes no model again.
"""

import json
import re
from typing import Any
from urllib.parse import quote

import pandas as pd

from evopress.accounting import Size, compressed_size, dense_size
from evopress.artifacts.atomic import write_text
from evopress.artifacts.configuration import read_configuration
from evopress.artifacts.model_facts import ModelFacts, read_model_facts
from evopress.artifacts.paths import DENSE, Results
from evopress.artifacts.stitched import read_stitched_manifest
from evopress.artifacts.tables import PERPLEXITY, read_provenance, read_table
from evopress.models.checkpoint import Checkpoint
from evopress.versions import versions
from evopress.yaml_text import to_yaml

PAPER = "https://arxiv.org/abs/2410.14649"
OWL = "https://arxiv.org/abs/2310.05175"
QUANTIZED = (
    "The weights are stored dequantized, in the type of the original, so the folder loads like the original, with "
    "`AutoModelForCausalLM.from_pretrained`, needs no special kernels, and takes as much memory as the original."
)
SPARSE = (
    "The removed weights are stored as zeros, so the folder loads like the original, with "
    "`AutoModelForCausalLM.from_pretrained`, and takes as much memory and time as the original: no mainstream runtime "
    "gains speed from zeros in arbitrary places today. (Patterns such as 2:4 can be used by some GPUs, once a runtime "
    "has converted the weights.)"
)


def write_card(results: Results, search: str) -> None:
    """Write README.md into the stitched folder; perplexity is told if it has been measured.

    Raises:
        ArtifactError: the stitched model, its configuration or a table is missing, damaged or of another model.
    """
    read_stitched_manifest(results, search)
    write_text(results.card(search), render_card(results, search))


def render_card(results: Results, search: str) -> str:
    """Text of the card.

    Raises:
        ArtifactError: as `write_card`.
    """
    facts = read_model_facts(results)
    configuration = read_configuration(results, search)
    settings = json.loads(read_provenance(results.configuration(search)).settings)
    checkpoint = Checkpoint(results.model)
    size, dense = compressed_size(checkpoint, configuration), dense_size(checkpoint, configuration)
    sections = [
        header(facts),
        f"# {escape(facts.name)} at {_level(size)}",
        _introduction(facts, search, settings, size),
        "## Size",
        _size_section(size, dense, settings),
        "## Held-out text",
        _perplexity_section(results, search),
        "## Levels",
        f"The level of each linear layer ({_meaning(size)}), by block.",
        levels_table(configuration),
        "## Settings",
        _settings_section(results, search, configuration),
        "## Versions",
        ", ".join(f"{name} {number}" for name, number in versions().items()),
    ]
    return "\n\n".join(sections) + "\n"


def header(facts: ModelFacts) -> str:
    """YAML header with the keys of the hub's model cards."""
    known: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["evopress", "compressed"],
        **facts.card,
    }
    if facts.hub_id:
        known |= {"base_model": facts.hub_id, "base_model_relation": "quantized"}
    return f"---\n{to_yaml(known, sort=True)}---"


def levels_table(configuration: pd.DataFrame) -> str:
    """Markdown table of levels, one row a block, one column a layer."""
    levels = configuration.pivot(index="block", columns="layer", values="level")
    levels = levels[list(dict.fromkeys(configuration["layer"]))]
    rows = [[str(block), *("-" if pd.isna(level) else str(level) for level in row)] for block, row in levels.iterrows()]
    return markdown_table(["block", *levels.columns], rows)


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    """GitHub-flavoured table with escaped cells."""
    lines = [columns, ["---"] * len(columns), *rows]
    cells = [line if number == 1 else [escape(cell) for cell in line] for number, line in enumerate(lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def escape(text: str) -> str:
    """Text as Markdown shows it literally, on one line."""
    return re.sub(r"([\\`*\[\]<>|#~&]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


def _level(size: Size) -> str:
    return f"{size.bits:.4g} bits per weight" if size.sparsity is None else f"{size.sparsity:.1%} sparsity"


def _meaning(size: Size) -> str:
    if size.sparsity is None:
        return "bits per weight, without scales"
    return "signed steps of equally many weights from the target sparsity, or n of every m weights kept"


def _introduction(facts: ModelFacts, search: str, settings: dict[str, Any], size: Size) -> str:
    origin = escape(facts.origin)
    if facts.hub_id:
        origin = f"[{escape(facts.hub_id)}](https://huggingface.co/{quote(facts.hub_id)})"
    how = {
        "evolution": f"found by the evolutionary search of [EvoPress]({PAPER})",
        "uniform": "the same for every layer",
        "owl": f"chosen by the outliers of each block ([OWL]({OWL}))",
    }
    chosen = how.get(str(settings.get("strategy")), f"found by the strategy {settings.get('strategy')}")
    return (
        f"A compressed version of {origin}. The linear layers listed below each have a level of compression; the rest "
        f"is as in the original. The levels are {chosen} (search `{search}`).\n\n"
        f"{QUANTIZED if size.sparsity is None else SPARSE} "
        "The packed size below is what the same numbers take with each layer stored at its level."
    )


def _size_section(size: Size, dense: Size, settings: dict[str, Any]) -> str:
    asked = f"{settings['target']:g}" if isinstance(settings.get("target"), int | float) else "not stated"
    if size.sparsity is None:
        rows = [
            ["bits per weight asked (compressed layers)", asked],
            ["bits per weight reached", f"{size.bits:.4f}"],
            ["bits per weight with scales and zeros", f"{size.bits_with_overhead:.4f}"],
        ]
    else:
        rows = [
            ["sparsity asked (compressed layers)", asked],
            ["sparsity reached", f"{size.sparsity:.4f}"],
            ["bits per weight with the bitmask", f"{size.bits_with_overhead:.4f}"],
        ]
    rows += [
        ["bits per weight of the original", f"{dense.bits:.4g}"],
        ["packed size of the whole model", f"{size.total_bytes / 1e6:,.1f} MB"],
        ["size of the original", f"{dense.total_bytes / 1e6:,.1f} MB"],
    ]
    return markdown_table(["", "value"], rows)


def _perplexity_section(results: Results, search: str) -> str:
    if not results.perplexity(search).exists():
        return "Not measured yet."
    measured = read_table(results.perplexity(search), PERPLEXITY).to_dict("records")
    original: dict[str, float] = {}
    if results.perplexity(DENSE).exists():
        table = read_table(results.perplexity(DENSE), PERPLEXITY)
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
    return markdown_table(columns, rows)


def _settings_section(results: Results, search: str, configuration: pd.DataFrame) -> str:
    """Settings that made the configuration and its variants, as the artifacts themselves record them."""
    made: dict[str, Any] = {"search": json.loads(read_provenance(results.configuration(search)).settings)}
    for name, rows in configuration.groupby("variants"):
        table = results.variant_table(str(name), int(rows["block"].min()))
        made.setdefault("variants", {})[str(name)] = json.loads(read_provenance(table).settings)
    return f"````yaml\n{to_yaml(made)}````"
