"""Whether a device gives what the CPU gives: codes of GPTQ, fitness of candidates, and both under memory pressure."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from plain import PlainEvaluator
from random_models import Machine, forget
from torch import Tensor

from evopress.artifacts.paths import Run
from evopress.compression.gptq import Quantized, factorize, gptq
from evopress.compression.hessian import accumulate, accumulate_hessians, symmetrize
from evopress.compression.methods.gptq import Gptq
from evopress.compression.stage import make_variants
from evopress.config.context import ComputeSettings, StageContext
from evopress.config.data import HessianSettings
from evopress.models.blockwise import BlockwiseModel
from evopress.search.base import Fitness
from evopress.search.candidates import make_offspring
from evopress.search.engine.evaluator import ModelEvaluator, model_evaluator, search_text
from evopress.search.engine.memory import least_memory, packed_limit, plan_memory
from evopress.search.engine.weights import PackedWeights
from evopress.search.evaluation import Minibatch
from evopress.search.problem import SearchProblem
from evopress.search.run import open_problem
from evopress.search.strategies.uniform import uniform_candidate

BITS = (2, 3, 4, 5, 6)
TIE = 1e-3
"""How near to the middle between two codes a weight must be, in steps, for devices to round it differently."""
FITNESS_BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
"""Most that fitness may differ, relative to it: sums of other orders, rounded to the type between blocks."""
MEMORY_BOUND = 1.25
"""Most that the peak on a card may be, as a multiple of `compute.memory_gb`: kernels have buffers of their own."""


def codes(machine: Machine) -> dict[str, object]:
    """GPTQ on the device and on the CPU: the same codes, but for ties and what follows from one in its row."""
    rows, columns = (512, 2048) if machine.full else (32, 128)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    mixed = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(2 * columns, columns, generator=generator) @ mixed
    hessian = inputs.T @ inputs
    here, there = (
        gptq(weight.to(device), hessian.to(device), BITS, damping=0.01) for device in ("cpu", machine.device)
    )
    differing, unexplained = compare_codes(weight, hessian, here, there)
    assert not unexplained, f"{unexplained} rows differ first where no tie is"
    usual = {"group_size": machine.sizes.group_size, "activation_order": True, "clip_search": True, "passes": 2}
    here, there = (
        gptq(weight.to(device), hessian.to(device), BITS, **usual)  # type: ignore[arg-type]
        for device in ("cpu", machine.device)
    )
    equal = float((here.codes == there.codes.cpu()).float().mean())
    errors = [found.errors.sum(1).cpu() for found in (here, there)]
    gap = float(((errors[0] - errors[1]).abs() / errors[0]).max())
    assert gap < 1e-3, f"errors of GPTQ differ by {gap:.1e}"
    return {"rows that differ": differing, "of": rows * len(BITS), "equal codes": equal, "errors differ by": gap}


def compare_codes(weight: Tensor, hessian: Tensor, here: Quantized, there: Quantized) -> tuple[int, int]:
    """Rows of one sweep per channel whose codes differ between devices, and those of them without a tie.

    The first column in which a row differs must hold a weight that lies in the middle between two codes, worked out
    in float64; what comes after it in the row follows from it.

    Args:
        weight: [rows, columns], as it was quantized, without groups or activation order.
        hessian: [columns, columns].
        here: all levels, on the CPU.
        there: the same from elsewhere.
    """
    assert torch.equal(here.scales, there.scales.cpu()) and torch.equal(here.zeros, there.zeros.cpu()), "grids differ"
    feedback = factorize(hessian, here.damping).feedback.double()
    differing = here.codes != there.codes.cpu()
    rows = differing.any(-1).nonzero().tolist()
    ties = 0
    for level, row in rows:
        column = int(differing[level, row].nonzero()[0])
        deviation = (weight[row] - here.weights[level, row])[:column].double()
        compensated = weight[row, column].double() + deviation @ feedback[:column, column]
        value = compensated / here.scales[level, row, 0].double() + here.zeros[level, row, 0]
        ties += abs(float(value % 1) - 0.5) < TIE
    return len(rows), len(rows) - ties


def hessians(machine: Machine) -> dict[str, object]:
    """Sums of outer products of 16-bit inputs: as exact as those of the CPU, which are in float32."""
    tokens, columns = (4096, 4096) if machine.full else (256, 128)
    dtype = torch.bfloat16 if machine.dtype == torch.float32 else machine.dtype
    inputs = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = inputs.double().T @ inputs.double()
    gaps = []
    for device in ("cpu", machine.device):
        total = torch.zeros(columns, columns, device=device)
        accumulate(total, inputs.to(device))
        gaps.append(float((symmetrize(total).cpu() - exact).norm() / exact.norm()))
    assert gaps[1] < max(4 * gaps[0], 1e-6), f"Hessians are off by {gaps[1]:.1e}, on the CPU by {gaps[0]:.1e}"
    return {"off by": gaps[1], "on the CPU": gaps[0]}


def fitness(machine: Machine) -> dict[str, object]:
    """Fitness of the same candidates by the engine on the device, on the CPU, and by one full pass each."""
    facts: dict[str, object] = {}
    for dtype in dict.fromkeys((torch.float32, machine.dtype)):
        run = machine.model("small", dtype)
        on_cpu = StageContext(run, ComputeSettings(device="cpu", memory_gb=1.0))
        with_variants(on_cpu, machine)
        problem = open_problem(run, machine.search(), "check")
        candidates, minibatch = candidates_of(problem, 8), first_sequences(2, machine)
        own = evaluator_of(on_cpu, problem)
        found = {
            "CPU": fitness_of(own, candidates, minibatch),
            "device": fitness_of(evaluator_of(machine.context(run), problem), candidates, minibatch),
            "plain": plain_of(own, run).evaluate(candidates, minibatch),
        }
        name = str(dtype).removeprefix("torch.")
        for other in ("CPU", "plain"):
            gap = relative_gap(found["device"], found[other])
            assert gap < FITNESS_BOUNDS[dtype], f"{name}: fitness differs by {gap:.1e} from that of {other}"
            facts[f"{name}, differs from {other} by"] = gap
    return facts


def pressure(machine: Machine) -> dict[str, object]:
    """Two blocks with hardly more memory than one: packed weights held in host memory, and read from their files."""
    run = machine.model("8B")
    problem = open_problem(run, machine.search(), "check")
    model = BlockwiseModel.from_folder(run.model, machine.device, resident=False, quick=True)
    least = least_memory(model, machine.sizes.length, problem.space.units) / 1e9
    del model
    candidates, minibatch = candidates_of(problem, 8), first_sequences(1, machine)
    expected, unpacked = None, {}
    facts: dict[str, object] = {"least memory, GB": least}
    for name, memory_gb, held in (("ample", None, True), ("held", 1.02 * least, True), ("mapped", 1.02 * least, False)):
        context = machine.context(run, memory_gb)
        with device_peak(machine) as peak:
            found, unpacked[name] = judged_twice(context, problem, candidates, minibatch, held=held)
        expected = expected or found
        gap = relative_gap(found, expected)
        assert gap < FITNESS_BOUNDS[machine.dtype], f"{name}: fitness differs by {gap:.1e}"
        facts |= {f"{name}, differs by": gap, f"{name}, unpacked again": unpacked[name]}
        if peak:
            facts[f"{name}, peak on the card, GB"] = peak[0] / 1e9
            assert peak[0] < MEMORY_BOUND * context.memory, f"{name}: took {peak[0] / 1e9:.2f} GB of {memory_gb} GB"
    forget(run)
    assert unpacked["ample"] == 0 < min(unpacked["held"], unpacked["mapped"]), f"unpacked again: {unpacked}"
    return facts


def judged_twice(
    context: StageContext,
    problem: SearchProblem,
    candidates: NDArray[np.int16],
    minibatch: Minibatch,
    *,
    held: bool,
) -> tuple[list[float], int]:
    """Fitness of candidates, and variants that are unpacked to judge them once more."""
    evaluator = evaluator_of(context, problem, held=held)
    found = fitness_of(evaluator, candidates, minibatch)
    before = evaluator.counters.unpacked
    fitness_of(evaluator, candidates, minibatch)
    return found, evaluator.counters.unpacked - before


@contextmanager
def device_peak(machine: Machine) -> Iterator[list[int]]:
    """Peak of the enclosed work on the card, in bytes, once it is done; stays empty on a CPU."""
    peak: list[int] = []
    gc.collect()  # an evaluator refers to itself
    if machine.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(machine.device)
    yield peak
    if machine.device.type == "cuda":
        peak.append(torch.cuda.max_memory_allocated(machine.device))


def with_variants(context: StageContext, machine: Machine) -> None:
    """Make Hessians and variants of a run on the device of the ``context``."""
    accumulate_hessians(context, HessianSettings(), 0)
    for block in range(blocks_of(context.run)):
        make_variants(context, "gptq", Gptq(bits=BITS, group_size=machine.sizes.group_size), [block])


def blocks_of(run: Run) -> int:
    """Transformer blocks of a prepared model."""
    model = BlockwiseModel.from_folder(run.model, torch.device("cpu"), resident=False)
    return len(model.blocks)


def evaluator_of(context: StageContext, problem: SearchProblem, *, held: bool = True) -> ModelEvaluator:
    """The engine, with packed weights held in host memory as far as they fit, or read from their files."""
    run, store = context.run, problem.store
    assert store is not None
    model = BlockwiseModel.from_folder(run.model, context.device, resident=False, quick=True)
    tokens, units = search_text(run), problem.space.units
    memory = plan_memory(context.memory_gb, model, tokens.shape[1], units)
    limit = packed_limit(context.compute.host_gb, memory, model, units) if held else 0
    packed = PackedWeights(store, context.device, model.stored, model.dtype, limit)
    return model_evaluator(
        model,
        problem.space,
        packed.unpack,
        tokens,
        Fitness("kl"),
        context.memory_gb,
        "check",
        lambda: None,
        read_ahead=packed.read_ahead,
        held=packed.bytes if context.device.type == "cpu" else 0,
    )


def plain_of(evaluator: ModelEvaluator, run: Run, sequences: int = 2) -> PlainEvaluator:
    """The plain evaluator of the first sequences, on the same device and with the same weights."""
    blocks, model = evaluator.blocks, evaluator.blocks.model
    return PlainEvaluator(
        run.model, model.dtype, blocks.units, blocks.unpack, evaluator.tokens[:sequences], model.device
    )


def first_sequences(count: int, machine: Machine) -> Minibatch:
    """The first sequences of the search text, whole."""
    return Minibatch(tuple(range(count)), (machine.sizes.length,) * count)


def candidates_of(problem: SearchProblem, count: int) -> NDArray[np.int16]:
    """Offspring of the uniform candidate at 3 bits."""
    parent = uniform_candidate(problem.space, 3.0, "check")
    return make_offspring(parent, problem.space, count, np.random.default_rng(0))


def fitness_of(evaluator: ModelEvaluator, candidates: NDArray[np.int16], minibatch: Minibatch) -> list[float]:
    """Fitness of each of ``candidates`` [C, units]."""
    return [found.fitness for found in evaluator.evaluate(candidates, minibatch)]


def relative_gap(found: Sequence[float], expected: Sequence[float]) -> float:
    """Largest difference, relative to what is expected; NaN if there is one."""
    return float(np.abs(np.subtract(found, expected) / np.array(expected)).max())
