"""The plan of a run: memory, disk and work of every stage, before anything runs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from evopress.artifacts.paths import Run
from evopress.config.command_line import snakemake_command
from evopress.data.held_out import leaks
from evopress.plan.judging import device_type, memory_needed
from evopress.plan.search import SearchWork, search_work
from evopress.plan.shape import ModelShape, shape_of
from evopress.plan.stages import stages
from evopress.plan.text import amount, columns, describe_model, search_table, stage_table
from evopress.search.strategies.evolution import Evolution
from evopress.search.strategies.random import RandomSearch
from evopress.util.device import working_dtype
from evopress.workflow.settings import ROLES, Settings
from evopress.workflow.slices import texts

USABLE = 0.9
"""Share of a device's memory that a search is given; the rest is for the runtime and what it cannot place."""

_NOTES = """\
Memory is the peak of one job, host and device together. Operations are those of matrix products, two for each weight
and token. Shares of block work are expectations over mutations; where layers of unlike size trade (group_rule none),
less is shared. Sizes marked ? hang on text whose length is not set."""


def plan(settings: Settings, run: Run, device_memory_gb: Sequence[float] = (), configs: Sequence[Path] = ()) -> str:
    """Text of the plan; downloads nothing but the model's config.

    Args:
        settings: the run.
        run: its folder; a model that is prepared there is read.
        device_memory_gb: accelerators to plan searches for; none is the device of the settings.
        configs: files that the settings are from, for the command that fetches the model.

    Raises:
        ConfigError: the settings do not fit the model.
        ModelError: the model's config cannot be had.
    """
    shape = shape_of(settings.model, run)
    if shape is None:
        advice = snakemake_command(run.model_manifest, configs)
        return "\n\n".join([*_warnings(settings), _without_shape(settings, advice)])
    variants = {
        name: made.table(shape.layers, shape.itemsize, f"variants.{name}") for name, made in settings.variants.items()
    }
    device = device_type(settings.compute.device)
    here = replace(shape, dtype=working_dtype(shape.dtype, torch.device(device)))
    own = _searches(settings, here, variants, settings.compute.memory_gb, device)
    by_device = {
        f"{gigabytes:g} GB": _searches(settings, shape, variants, USABLE * gigabytes, "cuda")
        for gigabytes in device_memory_gb
    } or {f"memory_gb {settings.compute.memory_gb:g}": own}
    parts = [describe_model(shape), stage_table(stages(settings, shape, variants, own))]
    budgets = [(shape, USABLE * gigabytes) for gigabytes in device_memory_gb] or [(here, settings.compute.memory_gb)]
    parts += [text for there, budget in budgets if (text := _shortage(settings, there, budget))]
    for name in own:
        title = f"search {name}, {own[name].generations} generations"
        parts.append(search_table(title, {device: works[name] for device, works in by_device.items()}))
    return "\n\n".join([*parts, *_warnings(settings, shape), _NOTES])


def _warnings(settings: Settings, shape: ModelShape | None = None) -> list[str]:
    """What makes results of this run worse or better than they look, as one paragraph or none."""
    found = leaks(settings.data)
    if shape is not None and shape.positions:
        found += [
            f"data.{name if name in ROLES else f'evaluation.{name}'}.sequence_length: {text.sequence_length} tokens "
            f"are more than the {shape.positions} positions that the model knows"
            for name, text in texts(settings).items()
            if text.sequence_length > shape.positions
        ]
    return ["\n".join(f"Warning: {sentence}" for sentence in found)] if found else []


def _shortage(settings: Settings, shape: ModelShape, memory_gb: float) -> str:
    """What a search will be refused for, where it has too little memory; empty where it has enough."""
    judging = [name for name, search in settings.searches.items() if search.tokens_asked()]
    least = memory_needed(shape, settings.data.search.sequence_length)
    if not judging or memory_gb * 1e9 >= least:
        return ""
    return (
        f"Too little memory: with {memory_gb:g} GB, {', '.join(judging)} will be refused; to search this model takes "
        f"at least compute.memory_gb: {math.ceil(least / 1e8) / 10:g}"
    )


def _searches(
    settings: Settings, shape: ModelShape, variants: Mapping[str, pd.DataFrame], memory_gb: float, device: str
) -> dict[str, SearchWork]:
    """Work of each evolutionary or random search."""
    text = settings.data.search
    return {
        name: search_work(shape, variants[search.variants], search, text, memory_gb, device, f"searches.{name}")
        for name, search in settings.searches.items()
        if isinstance(search, Evolution | RandomSearch)
    }


def _without_shape(settings: Settings, command: str) -> str:
    """What can be said of a model that has not been fetched yet; ``command`` fetches it."""
    rows = [["tokens judged", "a generation", "in all", ""]]
    for name, search in settings.searches.items():
        if isinstance(search, Evolution | RandomSearch):
            counts = [search.offspring, *search.survivors[:-1]]
            counts[-1] += 1  # the parent
            tokens = sum(count * size for count, size in zip(counts, search.tokens, strict=True))
            rows.append([f"  search {name}", amount(tokens), amount(tokens * search.generations), ""])
    rows += [[f"  text {name}", "", amount(text.tokens or float("nan")), ""] for name, text in texts(settings).items()]
    return (
        "The shape of this model is known only once it has been fetched, so memory, disk and work are not.\n"
        f"Fetch it and plan again:\n    {command}\n\n" + columns(rows)
    )
