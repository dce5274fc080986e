"""The plan of a run as text: memory, disk and work of every stage, and hours where rates were measured."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import fill

from evopress.artifacts.paths import Run
from evopress.config.base import snakemake_command
from evopress.config.context import SHARE
from evopress.data.held_out import leaks
from evopress.plan.searches import SearchWork, requests_of, search_work
from evopress.plan.shape import ModelShape, file_of, shape_of, uncounted
from evopress.plan.stages import Stage, Stages, tokens_of
from evopress.search.problem import problem_of
from evopress.util.device import resolve_device
from evopress.util.errors import ConfigError
from evopress.util.text import amount, columns
from evopress.workflow.settings import ROLES, Settings
from evopress.workflow.slices import effects as single_effects
from evopress.workflow.slices import texts

_NOTES = """\
Memory is the peak of one job, host and device together. What is read counts as if nothing cached it: where nodes share
a disk, that much passes the network. Operations are those of matrix products, two for each weight and token. Searches
were drawn for a few rounds, with random fitness. Sizes marked ? hang on text whose length is not set."""
_HOURS = """
Hours are operations at the rates that were measured{disk}, on {devices}, one stage after the other."""


@dataclass(frozen=True)
class Rates:
    """What was measured on one device."""

    operations: Mapping[str, float]
    """Operations a second, by stage: hessians, variants, search, perplexity."""
    unpack: float = math.inf
    """Bytes of weights that are brought to the device a second, beside its work."""
    disk: float = math.inf
    """Bytes a second that the disk takes and gives to all jobs together; without it, it takes no time."""

    @classmethod
    def read(cls, path: Path) -> "Rates":
        """Rates of a file: JSON with a section `rates`, as the check of a GPU machine writes it.

        Raises:
            ConfigError: it cannot be read, or holds none.
        """
        try:
            rates = json.loads(path.read_text(encoding="utf-8"))["rates"]
            found = {name: float(rate) for name, rate in rates.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ConfigError(f"{path}: holds no section `rates` of numbers ({what}); see docs/cluster.md") from error
        if bad := [name for name, rate in found.items() if not 0 < rate < math.inf]:
            raise ConfigError(f"{path}: rates.{bad[0]} is no rate: {found[bad[0]]:g}")
        return cls(found, found.pop("unpack", math.inf), found.pop("disk", math.inf))

    def hours(self, stage: Stage, devices: int) -> float:
        """Hours of a stage on so many devices; NaN where a rate that it needs was not measured."""
        working = sum(work / self.operations.get(name, math.nan) for name, work in stage.work.items())
        seconds = max(working, stage.unpacked / self.unpack) / min(devices, stage.at_once or stage.jobs)
        return (seconds + ((stage.read + stage.disk) / self.disk if self.disk < math.inf else 0)) / 3600


@dataclass(frozen=True)
class Planned:
    """The plan of a run on the device of its settings."""

    stages: list[Stage]
    works: dict[str, SearchWork] = field(default_factory=dict)
    """Of each search that evaluates candidates, by its name."""
    refusals: list[str] = field(default_factory=list)
    """Searches, and single effects, that have too little memory."""


def plan(
    settings: Settings,
    run: Run,
    device_memory_gb: Sequence[float] = (),
    configs: Sequence[Path] = (),
    rates: Rates | None = None,
    devices: int | None = None,
) -> str:
    """Text of the plan; downloads nothing but the model's config.

    Args:
        settings: the run.
        run: its folder; a model that is prepared there is read.
        device_memory_gb: accelerators to plan for; none is the device of the settings.
        configs: files that the settings are from, for the command that fetches the model.
        rates: what was measured; without it, nothing is said of time.
        devices: that jobs share; None is one for each process of a search.

    Raises:
        ConfigError: the settings do not fit the model.
        ModelError: the model's config cannot be had.
    """
    shape = shape_of(settings.model, run)
    if shape is None:
        advice = snakemake_command(run.model_manifest, configs)
        return "\n\n".join([*_warnings(settings), _without_shape(settings, advice)])
    devices = devices or settings.compute.processes
    parts = [describe_model(shape)]
    places: Sequence[float | None] = device_memory_gb or [None]
    for memory in places:
        there, device_gb = settings, None
        if memory is not None:
            device_gb = SHARE * memory
            there = settings.model_copy(update={"compute": settings.compute.model_copy(update={"device": "cuda"})})
            parts.append(f"On {memory:g} GB, of which a search gets {device_gb:g}:")
        found = planned(there, run, shape, device_gb)
        parts += [stage_table(found.stages, rates, devices), *found.refusals]
        parts += [describe_search(name, settings, work) for name, work in found.works.items() if work.rounds]
    parts += [fill(sentence, 120) for sentence in uncounted(settings.model, run, settings.searches)]
    parts += _warnings(settings, shape)
    disk = "" if rates is None or rates.disk == math.inf else " and the disk's"
    many = "one device" if devices == 1 else f"{devices} devices"
    return "\n\n".join(parts) + "\n\n" + _NOTES + (_HOURS.format(disk=disk, devices=many) if rates else "")


def planned(settings: Settings, run: Run, shape: ModelShape | None = None, device_gb: float | None = None) -> Planned:
    """What each stage will need; without stages if the model has to be fetched before its shape is known.

    Args:
        settings: the run.
        run: its folder.
        shape: of the model; None is worked out.
        device_gb: memory of a search on its device; None is that of the settings.

    Raises:
        ConfigError: the settings do not fit the model.
        ModelError: the model's config cannot be had.
    """
    shape = shape or shape_of(settings.model, run)
    if shape is None:
        return Planned([])
    tables = {name: shape.table(made, f"variants.{name}") for name, made in settings.variants.items()}
    name = settings.compute.device  # which need not be in the machine that plans
    device = resolve_device(name).type if name == "auto" else name.partition(":")[0]
    compute, here = settings.compute, shape.on(device)
    measured, works, refusals = dict[str, SearchWork](), dict[str, SearchWork](), list[str]()
    for name, effects in single_effects(settings).items():
        problem = problem_of({one: tables[one] for one in effects.sources}, effects.constraints())
        try:
            asked = effects.requests(problem.space)
            measured[name] = search_work(here, problem, effects, asked, settings.data.search, compute, device_gb)
        except ConfigError as error:
            refusals.append(f"effects {name} will be refused: {error}")
    for name, search in settings.searches.items():
        file, own = file_of(settings.model, run, shape, search.target), {one: tables[one] for one in search.sources}
        problem = problem_of(own, search.constraints(f"searches.{name}", file))
        try:
            asked = requests_of(search, problem)
            works[name] = search_work(here, problem, search, asked, settings.data.search, compute, device_gb)
        except ConfigError as error:
            refusals.append(f"search {name} will be refused: {error}")
    return Planned(list(Stages(settings, here).all(tables, measured, works)), works, refusals)


def describe_model(shape: ModelShape) -> str:
    """One line on the model."""
    source = "" if shape.source is None else f", from a quantized file of {amount(shape.source, 'B')}"
    parameters, dtype = amount(shape.outside + shape.inside), str(shape.stored).removeprefix("torch.")
    return (
        f"{type(shape.model).__name__}: {parameters} parameters in {len(shape.blocks)} blocks with {len(shape.layers)} "
        f"linear layers, {amount(shape.bytes, 'B')} in {dtype}{source}"
    )


def stage_table(stages: Sequence[Stage], rates: Rates | None = None, devices: int = 1) -> str:
    """One row for each stage, and the totals; where a part is unknown, they are the least it can be."""
    rows = [["stage", "jobs", "memory", "written", "read", "tokens", "operations", *["hours"] * bool(rates), ""]]
    hours = [rates.hours(stage, devices) for stage in stages] if rates else []
    for index, stage in enumerate(stages):
        sizes = [amount(size, "B") for size in (stage.memory, stage.disk, stage.read)]
        work = [amount(stage.tokens), amount(stage.flops, "FLOP"), *(_hours(time) for time in hours[index : index + 1])]
        rows.append([stage.name, str(stage.jobs), *sizes, *work, stage.note])
    written, read, flops = ([getattr(stage, name) for stage in stages] for name in ("disk", "read", "flops"))
    peak = max((stage.memory for stage in stages if not math.isnan(stage.memory)), default=0.0)
    sums = [_total(written, "B"), _total(read, "B"), "", _total(flops, "FLOP")]
    if rates:
        known = [time for time in hours if not math.isnan(time)]
        sums.append(">= " * (len(known) < len(hours)) + _hours(sum(known)))
    rows.append(["total", str(sum(stage.jobs for stage in stages)), amount(peak, "B") + " peak", *sums, ""])
    return columns(rows)


def _hours(hours: float) -> str:
    return "?" if math.isnan(hours) else f"{hours:,.1f}" if hours >= 10 else f"{hours:.2f}"


def _total(values: Sequence[float], unit: str) -> str:
    known = [value for value in values if not math.isnan(value)]
    return ("" if len(known) == len(values) else ">= ") + amount(sum(known), unit)


def describe_search(name: str, settings: Settings, work: SearchWork) -> str:
    """What a search does in its rounds, in its first process."""
    one = work.a_round
    how = "kept on the device" if work.kept else "streamed, as they do not fit"
    return fill(
        f"search {name}, {work.rounds:.0f} {settings.searches[name].rounds}: each evaluates "
        f"{amount(one.candidate_tokens)} tokens, goes {one.passes:.0f} times through all blocks, does "
        f"{100 * one.share_of_block_work:.0f} % of the block work of one candidate at a time, and unpacks "
        f"{amount(one.unpacked_bytes, 'B')} of weights; weights are {how}. On the device: "
        f"{amount(work.memory_bytes, 'B')}, of which hidden states {amount(one.peak_state_bytes, 'B')}; on the host "
        f"those of the dense model, {amount(work.dense_bytes, 'B')}.",
        120,
    )


def _warnings(settings: Settings, shape: ModelShape | None = None) -> list[str]:
    """What makes results of this run worse or better than they look, as one paragraph or none."""
    found = leaks(settings.data)
    positions = getattr(shape.config, "max_position_embeddings", None) if shape else None
    for name, text in texts(settings).items():
        if positions and text.sequence_length > positions:
            found.append(
                f"data.{name if name in ROLES else f'evaluation.{name}'}.sequence_length: {text.sequence_length} "
                f"tokens are more than the {positions} positions that the model knows"
            )
    return ["\n".join(f"Warning: {sentence}" for sentence in found)] if found else []


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
