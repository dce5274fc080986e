"""Time and memory of stages on random models, against the plan, the matrix rate and the plain evaluator."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
from memory import Growth, peak_growth
from parity import blocks_of, device_peak, evaluator_of, first_sequences, fitness_of, plain_of, relative_gap
from phases import peak_gflops, wait_for
from random_models import Machine, calibration_tokens

from evopress.artifacts.paths import DENSE, Run
from evopress.compression.hessian import accumulate_hessians
from evopress.compression.methods.gptq import Gptq
from evopress.compression.stage import make_variants
from evopress.config.data import HessianSettings
from evopress.evaluation.perplexity import evaluate_perplexity
from evopress.plan import text
from evopress.plan.shape import ModelShape, shape_of
from evopress.plan.stages import Stage
from evopress.search.candidates import make_offspring
from evopress.search.engine.evaluator import ModelEvaluator
from evopress.search.evaluation import CountingEvaluator
from evopress.search.problem import SearchProblem
from evopress.search.run import open_problem

PLAIN_CANDIDATES = 4
"""Candidates that the plain evaluator judges, one after the other."""


@dataclass
class Taken:
    """What a piece of work took."""

    seconds: float = 0.0
    card: list[int] = field(default_factory=list)
    host: Growth = field(default_factory=Growth)


@contextmanager
def taken(machine: Machine) -> Iterator[Taken]:
    """Time the enclosed work, and watch its memory."""
    facts = Taken()
    with device_peak(machine) as facts.card, peak_growth() as facts.host:
        started = time.perf_counter()
        yield facts
        wait_for(machine.device)
        facts.seconds = time.perf_counter() - started


def matrix_rate(machine: Machine) -> dict[str, object]:
    """Rate of matrix products in the 16-bit type (on a CPU at reduced size: float32), which others are shares of."""
    return {"type": str(machine.dtype).removeprefix("torch."), "TFLOP/s": _matrix_rate(machine) / 1e12}


def hessians(machine: Machine, name: str) -> dict[str, object]:
    """The Hessians of a model, written to disk as the stage does."""
    run = machine.model(name)
    with taken(machine) as facts:
        accumulate_hessians(machine.context(run), HessianSettings(), 0)
    return measured(machine, facts, planned(machine, run)[1]["hessians"], calibration_tokens(run, machine.sizes))


def variants(machine: Machine, name: str) -> dict[str, object]:
    """GPTQ of five levels for all blocks of a model, with Hessians that are read and variants that are written."""
    run = machine.model(name)
    with taken(machine) as facts:
        for block in range(blocks_of(run)):
            make_variants(machine.context(run), "gptq", Gptq(group_size=machine.sizes.group_size), [block])
            run.hessian(block).unlink()
    shape, stage = planned(machine, run)
    weights = float(shape.layers["parameters"].sum())
    return {"weights/s": weights / facts.seconds, **measured(machine, facts, stage["variants gptq"])}


def generation(machine: Machine) -> dict[str, object]:
    """One generation of a search, and the plain evaluator on some of its candidates."""
    run, strategy = machine.model("1B"), machine.search()
    problem, rng = open_problem(run, strategy, "check"), np.random.default_rng(0)
    with taken(machine) as opening:
        engine = evaluator_of(machine.context(run), problem)
    evaluator = CountingEvaluator(engine)
    state, _ = strategy.first_round(problem, evaluator, rng)
    evaluator.evaluate(state.population, evaluator.draw(strategy.tokens[0], rng))  # its weights are there, as later on
    before, evaluator.tokens = replace(engine.counters), 0
    with taken(machine) as facts:
        strategy.next_round(state, problem, evaluator, rng)
    shape, stage = planned(machine, run)
    work = engine.counters
    flops = (work.block_tokens - before.block_tokens) * shape.block_flops(machine.sizes.length)
    flops += (work.head_tokens - before.head_tokens) * shape.head_flops
    plain, gap = _plain(machine, engine, make_offspring(state.population, problem.space, PLAIN_CANDIDATES, rng), run)
    # The dense model's run on the search text is part of the opening, and of what the plan counts.
    facts.card = [max(sizes) for sizes in zip(opening.card, facts.card, strict=True)]
    facts.host.bytes += opening.host.bytes
    return {
        **measured(machine, facts, replace(stage["search paper"], work={"search": flops}), evaluator.tokens),
        "unpacked, bytes/s": _unpacked(machine, engine, problem),
        "times the plain evaluator": evaluator.tokens / facts.seconds / plain,
        "plain evaluator, tokens/s": plain,
        "fitness differs from it by": gap,
        "opening, s": opening.seconds,
    }


def evaluation(machine: Machine) -> dict[str, object]:
    """Perplexity of the dense model, whose final hidden states are kept."""
    run = machine.model("1B")
    with taken(machine) as facts:
        evaluate_perplexity(machine.context(run), DENSE, ["text"])
    shape, stage = planned(machine, run)
    tokens = machine.sizes.evaluation
    flops = tokens * (len(shape.blocks) * shape.block_flops(machine.sizes.length) + shape.head_flops)
    return measured(machine, facts, replace(stage["perplexity"], work={"perplexity": flops}), tokens)


def measured(machine: Machine, facts: Taken, stage: Stage, tokens: int | None = None) -> dict[str, object]:
    """Rates of a stage and its memory, beside what the plan says of its operations and memory."""
    found: dict[str, object] = {"measured, s": facts.seconds}
    if tokens:
        found["tokens/s"] = tokens / facts.seconds
    found["operations/s"] = stage.flops / facts.seconds
    found["share of the matrix rate"] = stage.flops / facts.seconds / _matrix_rate(machine)
    if facts.card:
        found["peak on the card, GB"] = facts.card[0] / 1e9
    return found | {"growth on the host, GB": facts.host.bytes / 1e9, "planned for both, GB": stage.memory / 1e9}


@cache
def planned(machine: Machine, run: Run) -> tuple[ModelShape, dict[str, Stage]]:
    """Shape of a model as the device works with it, and the plan of each stage."""
    settings = machine.settings(run)
    shape = shape_of(settings.model, run)
    assert shape is not None
    stages = text.planned(settings, run, shape).stages
    return shape.on(machine.device.type), {stage.name: stage for stage in stages}


def _unpacked(machine: Machine, engine: ModelEvaluator, problem: SearchProblem) -> float:
    """Bytes of weights that are unpacked on the device a second, of variants that the host holds."""
    size, seconds = 0, 0.0
    for _ in range(2):  # the first time, they are read from disk
        started = time.perf_counter()
        names = [(unit.block, unit.layer, unit.levels[0].label) for unit in problem.space.units]
        size = sum(engine.blocks.unpack(*name).nbytes for name in names)
        wait_for(machine.device)
        seconds = time.perf_counter() - started
    return size / seconds


@cache
def _matrix_rate(machine: Machine) -> float:
    return 1e9 * peak_gflops(machine.dtype, 3.0 if machine.full else 0.3, machine.device)


def _plain(machine: Machine, engine: ModelEvaluator, candidates: np.ndarray, run: Run) -> tuple[float, float]:
    """Tokens a second of the plain evaluator on one sequence, and how far its fitness is from the engine's."""
    minibatch = first_sequences(1, machine)
    expected = fitness_of(engine, candidates, minibatch)
    plain = plain_of(engine, run, sequences=1)
    plain.evaluate(candidates[:1], minibatch)  # the first candidate changes every layer
    wait_for(machine.device)
    started = time.perf_counter()
    found = plain.evaluate(candidates[1:], minibatch)
    seconds = time.perf_counter() - started
    return (len(candidates) - 1) * minibatch.tokens / seconds, relative_gap(found, expected[1:])
