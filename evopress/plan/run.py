"""The plan of a run: memory, disk and work of every stage, before anything runs."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from evopress.artifacts.paths import Run
from evopress.config.command_line import snakemake_command
from evopress.data.held_out import leaks
from evopress.plan.searches import SearchPlanner, SearchWork, memory_needed, requests_of
from evopress.plan.shape import ModelShape, file_of, shape_of, uncounted
from evopress.plan.stages import stages, tokens_of
from evopress.plan.text import amount, columns, describe_model, search_table, stage_table
from evopress.search.problem import problem_of
from evopress.util.device import resolve_device
from evopress.workflow.settings import ROLES, Settings
from evopress.workflow.slices import texts

USABLE = 0.9
"""Share of a device's memory that a search is given; the rest is for the runtime and what it cannot place."""

_NOTES = """\
Memory is the peak of one job, host and device together. Operations are those of matrix products, two for each weight
and token. What rounds take is the mean of some that were drawn with random fitness. Sizes marked ? hang on text whose
length is not set."""


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
    variants = {name: shape.table(made, f"variants.{name}") for name, made in settings.variants.items()}
    device, memory_gb = _device_type(settings.compute.device), settings.compute.memory_gb
    here = shape.on(device)
    places = [(f"memory_gb {memory_gb:g}", here, memory_gb, device)]
    places += [(f"{size:g} GB", shape.on("cuda"), USABLE * size, "cuda") for size in device_memory_gb]
    works: dict[str, dict[str, SearchWork]] = {}
    needed: dict[str, Callable[[ModelShape], int]] = {}
    for name, search in settings.searches.items():
        table, where = variants[search.variants], f"searches.{name}"
        file = file_of(settings.model, run, shape, search.target)
        problem = problem_of(
            table, search.variants, search.target, search.grouping(), where, search.tied, search.levels, file
        )
        asked = requests_of(search, problem)
        if search.tokens_asked():
            precise = any(request.precise for request in asked)
            length, units = settings.data.search.sequence_length, problem.space.units
            needed[name] = partial(memory_needed, length=length, units=units, precise=precise)
        works[name] = {
            place: SearchPlanner(there, problem, settings.data.search, budget, kind).plan(search, asked)
            for place, there, budget, kind in places
        }
    own = {name: by_place[places[0][0]] for name, by_place in works.items()}
    parts = [describe_model(shape), stage_table(list(stages(settings, shape, here, variants, own)))]
    shown = places[1:] or places
    parts += [text for _, there, budget, _ in shown if (text := _shortage(there, budget, needed))]
    for name, by_place in works.items():
        if own[name].rounds:
            title = f"search {name}, {own[name].rounds:.0f} {settings.searches[name].rounds}"
            parts.append(search_table(title, {place: by_place[place] for place, *_ in shown}))
    parts += uncounted(settings.model, run, settings.searches)
    return "\n\n".join([*parts, *_warnings(settings, shape), _NOTES])


def _device_type(name: str) -> str:
    """Type of the device that the settings name, which need not be in the machine that plans."""
    return resolve_device(name).type if name == "auto" else name.partition(":")[0]


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


def _shortage(shape: ModelShape, memory_gb: float, needed: Mapping[str, Callable[[ModelShape], int]]) -> str:
    """What searches will be refused for, where they have too little memory; empty where they have enough.

    ``needed`` gives what each takes of a model of this shape (`memory_needed`).
    """
    bytes_of = {name: least_of(shape) for name, least_of in needed.items()}
    refused = [name for name, least in bytes_of.items() if memory_gb * 1e9 < least]
    if not refused:
        return ""
    least = max(bytes_of.values())
    return (
        f"Too little memory: with {memory_gb:g} GB, {', '.join(refused)} will be refused; to search this model "
        f"takes at least compute.memory_gb: {math.ceil(least / 1e8) / 10:g}"
    )


def _without_shape(settings: Settings, command: str) -> str:
    """What can be said of a model that has not been fetched yet; ``command`` fetches it."""
    rows = [["tokens asked for", "", ""]]
    for name, search in settings.searches.items():
        if asked := search.tokens_asked():
            rows.append([f"  search {name}, at once", amount(max(asked.values())), ""])
    rows += [[f"  text {name}", amount(tokens_of(text)), ""] for name, text in texts(settings).items()]
    return (
        "The shape of this model is known only once it has been fetched, so memory, disk and work are not.\n"
        f"Fetch it and plan again:\n    {command}\n\n" + columns(rows)
    )
