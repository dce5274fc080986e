"""The slice of the settings that each stage's result depends on, as normalised JSON, and nothing more.

Snakemake reruns a job whose slice has changed, so whatever cannot change a result stays out.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from evopress.artifacts.paths import DENSE, EMBEDDING, Run, manifest_path
from evopress.config.data import TextSettings
from evopress.config.evaluation import CardFacts, RuntimeSettings
from evopress.export.exporters import EXPORTERS
from evopress.search.base import EffectsSettings
from evopress.workflow.settings import Settings


def model_slice(settings: Settings) -> str:
    """Source and type of the weights; the number of blocks only says which jobs there are, the base is for cards."""
    return settings.model.model_dump_json(exclude={"blocks", "base_model"})


def texts(settings: Settings) -> dict[str, TextSettings]:
    """Every text by the name of its file of tokens."""
    return {"calibration": settings.data.calibration, "search": settings.data.search, **settings.data.evaluation}


def text_setting(name: str) -> str:
    """Where the settings have the text of this name."""
    return f"data.{name}" if name in ("calibration", "search") else f"data.evaluation.{name}"


def tokens_slice(settings: Settings, dataset: str) -> str:
    """Text and windowing of one data set."""
    return texts(settings)[dataset].model_dump_json()


def hessians_slice(settings: Settings) -> str:
    """Shards: the order of summation shows in the last bits. Whether Hessians are kept changes nothing in them."""
    return settings.hessians.model_dump_json(exclude={"keep"})


def variants_slice(settings: Settings, variants: str) -> str:
    """Method and levels of one database of variants."""
    return settings.variants[variants].model_dump_json()


def effects(settings: Settings) -> dict[str, EffectsSettings]:
    """Sets of single effects that searches start from, by name: one for all that ask for the same."""
    asked = [search.effects() for search in settings.searches.values()]
    return {found.name: found for found in asked if found is not None}


def effects_slice(settings: Settings, name: str) -> str:
    """What is measured."""
    return effects(settings)[name].model_dump_json()


def search_slice(settings: Settings, search: str) -> str:
    """One search."""
    return settings.searches[search].model_dump_json()


def polish_slice(settings: Settings, search: str) -> str:
    """How what a search chose is made anew, and the method that does it."""
    chosen = settings.searches[search]
    return json.dumps({"polish": chosen.polish, **settings.variants[chosen.sources[0]].model_dump(mode="json")})


def export_slice(settings: Settings, search: str, exporter: str) -> str:
    """One export of a search: both their settings."""
    own = settings.exporter_of(search, exporter).model_dump(mode="json")
    polish = settings.searches[search].polish
    return json.dumps({**json.loads(search_slice(settings, search)), "polish": polish, **own})


def card_slice(settings: Settings) -> str:
    """What cards say that no artifact knows."""
    return CardFacts(**settings.card.model_dump(), base_model=settings.model.base_model_id).model_dump_json()


def tasks_slice(settings: Settings) -> str:
    """lm-eval tasks."""
    return settings.evaluation.tasks.model_dump_json()


def perplexity_slice(settings: Settings) -> str:
    """Names of the evaluation sets."""
    return json.dumps({"datasets": list(settings.data.evaluation)})


def runtime_slice(settings: Settings) -> str:
    """How exported files are measured; those that only a target of its own asks for, with the defaults."""
    return (settings.evaluation.runtime or RuntimeSettings()).model_dump_json()


def log_names(settings: Settings) -> dict[str, list[str]]:
    """Names in folders of `logs/` that belong to these settings; in other folders, all do."""
    searches = list(settings.searches)
    exports = [f"{search}_{exporter}" for search in searches for exporter in EXPORTERS.names]
    return {
        "variants": list(settings.variants),
        "effects": list(effects(settings)),
        "search": searches,
        "polish": searches,
        "export": exports,
        "evaluation": [DENSE, *searches],
        "card": exports,
    }


def expected_slices(settings: Settings, run: Run, blocks: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """One artifact of each job, with the slice that should have made it."""
    yield run.layers, model_slice(settings)
    for dataset in texts(settings):
        yield run.tokens(dataset), tokens_slice(settings, dataset)
    for block in blocks:
        yield manifest_path(run.hessian(block)), hessians_slice(settings)
        for variants in settings.variants:
            if settings.variants[variants].per_block:
                yield run.variant_table(variants, block), variants_slice(settings, variants)
    for variants, made in settings.variants.items():
        if made.compresses_embedding:
            yield run.variant_table(variants, EMBEDDING), variants_slice(settings, variants)
        if not made.per_block:
            yield run.module_table(variants), variants_slice(settings, variants)
    for name in effects(settings):
        yield run.effects(name), effects_slice(settings, name)
    for search in settings.searches:
        yield run.configuration(search), search_slice(settings, search)
        if settings.searches[search].polishes:
            yield run.polish_effort(search), polish_slice(settings, search)
        for exporter in EXPORTERS.names:  # a target of its own may have made what the settings do not name
            yield run.export_manifest(search, exporter), export_slice(settings, search, exporter)
    for model in (DENSE, *settings.searches):
        yield run.perplexity(model), perplexity_slice(settings)
    for model in settings.on_tasks():
        yield run.tasks(model), tasks_slice(settings)
    for model in settings.in_runtime():
        yield run.runtime(model), runtime_slice(settings)
