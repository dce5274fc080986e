"""The fitness engine against the plain evaluator, on the embedded model, in one process:

    python tests/benchmarks/fitness.py

fetches the model and the search text of config/smollm2-3bit.yaml into results/benchmark (once), then judges offspring
of a uniform 3-bit parent (real mutation, 1 to 3 switches) with both, by turns. Variants are rounded to nearest instead
of by GPTQ, in the same packed format, which costs the same to unpack and seconds instead of minutes to make.

Each run has offspring and tokens of its own. Both evaluators have judged once before the first timed run: the engine
holds the parent's weights, the plain one those of its last candidate. The dense model's states (logits, for the plain
one) are made beforehand, as once in a search; making its logits from the states counts for the engine.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml
from memory import peak_growth
from numpy.typing import NDArray
from phases import Phases, peak_gflops
from plain import PlainEvaluator
from rounded import RoundedVariants
from transformers.utils.logging import disable_progress_bar

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import LAYERS, read_table
from evopress.compression.base import Level, Unit
from evopress.compression.families import BITS
from evopress.data.tokens import read_tokens, write_tokens
from evopress.models.blockwise import BlockwiseModel
from evopress.models.checkpoint import Checkpoint
from evopress.models.sources import prepare_model
from evopress.search.base import Fitness
from evopress.search.candidates import make_offspring
from evopress.search.engine.evaluator import ModelEvaluator, model_evaluator
from evopress.search.evaluation import Minibatch
from evopress.search.space import Space, make_space
from evopress.search.strategies.uniform import uniform_candidate
from evopress.workflow.settings import Settings

CASES = ("16x512", "64x512", "8x2048")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WIDTHS = (2, 3, 4, 5, 6)
TARGET = 3.0


def main() -> None:
    """Prepare, run every case in every type, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results/benchmark"), help="folder of model and tokens")
    parser.add_argument("--cases", nargs="+", default=CASES, help="candidates x tokens")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each; the median is reported")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--memory-gb", type=float, default=4.0, help="as compute.memory_gb")
    parser.add_argument("--no-profile", action="store_true", help="skip the profile of the engine")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    results = Run(arguments.results)
    prepare(results)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; variants rounded to nearest, same packing")
    for name in arguments.dtypes:
        bench = Bench(results, DTYPES[name], arguments.memory_gb)
        peak = peak_gflops(DTYPES[name])
        print(f"\n{name}: torch.mm reaches {peak:.0f} GFLOP/s here")
        for case in arguments.cases:
            candidates, tokens = map(int, case.split("x"))
            bench.compare(candidates, tokens, arguments.runs)
            if not arguments.no_profile:
                bench.profile(candidates, tokens, peak)


def prepare(results: Run) -> None:
    """Model and search tokens of the embedded default, unless they are there."""
    settings = Settings.load(yaml.safe_load(Path("config/smollm2-3bit.yaml").read_text(encoding="utf-8")))
    if not results.model_manifest.exists():
        prepare_model(settings.model, results)
    if not results.tokens("search").exists():
        write_tokens("search", "search", settings.data.search, results)


class Bench:
    """Both evaluators in one type."""

    def __init__(self, results: Run, dtype: torch.dtype, memory_gb: float) -> None:
        self.dtype, self.rng = dtype, np.random.default_rng(0)
        self.space = search_space(results)
        self.parent = uniform_candidate(self.space, TARGET, "benchmark")
        self.tokens = read_tokens(results, "search")
        self.variants = RoundedVariants(Checkpoint(results.model), self.space.units)
        self.unpack: Callable[..., torch.Tensor] = lambda block, layer, level: self.variants.weight(
            block, layer, level, dtype
        )
        self.plain = PlainEvaluator(results.model, dtype, self.space.units, self.unpack, self.tokens)
        self.engine = self._engine(results, memory_gb)

    def _engine(self, results: Run, memory_gb: float) -> ModelEvaluator:
        model = BlockwiseModel.from_folder(results.model, torch.device("cpu"), self.dtype, resident=False)
        return model_evaluator(
            model,
            self.space,
            lambda block, layer, level: self.unpack(block, layer, level),
            self.tokens,
            Fitness("kl"),
            memory_gb,
            "benchmark",
            lambda: None,
        )

    def compare(self, count: int, tokens: int, runs: int) -> None:
        """Run both by turns and print ratio, share of block work, memory and parity."""
        ratios, seconds, shares, gap = [], ([], []), [], 0.0
        memory = [0.0, 0.0]
        counters = self.engine.counters
        for run in range(-1, runs):  # the first run warms up and measures memory
            offspring, minibatch = self._draw(count, tokens)
            before = counters.block_tokens, counters.block_tokens_alone
            times, fitness = [0.0, 0.0], [[0.0], [0.0]]
            for which in (0, 1) if run % 2 else (1, 0):
                judge = self._judge_plain if which == 0 else self._judge_engine
                if run < 0:
                    with peak_growth() as growth:
                        judge(offspring, minibatch)
                    memory[which] = growth.bytes
                start = time.perf_counter()
                fitness[which] = judge(offspring, minibatch)
                times[which] = time.perf_counter() - start
            gap = max(gap, float(np.abs(np.subtract(*fitness)).max()))
            if run < 0:
                continue
            ratios.append(times[0] / times[1])
            for kept, taken in zip(seconds, times, strict=True):
                kept.append(taken)
            done, alone = counters.block_tokens - before[0], counters.block_tokens_alone - before[1]
            shares.append(done / alone)
        held = self.plain.held_bytes, self._engine_bytes()
        plain, engine = (statistics.median(kept) for kept in seconds)
        print(
            f"\n{count} candidates x {tokens} tokens: {statistics.median(ratios):.2f} times faster "
            f"({min(ratios):.2f} to {max(ratios):.2f} in {runs} runs; plain {plain:.2f} s, engine {engine:.2f} s)\n"
            f"  block work done: {100 * statistics.mean(shares):.0f} % of one candidate at a time\n"
            f"  peak memory: plain {gigabytes(held[0] + memory[0])} ({gigabytes(held[0])} held), "
            f"engine {gigabytes(held[1] + memory[1])} ({gigabytes(held[1])} held)\n"
            f"  parity: fitness near {statistics.mean(fitness[1]):.3f}, largest difference {gap:.1e}"
        )

    def profile(self, count: int, tokens: int, peak: float) -> None:
        """One more run of the engine, with its time by phase."""
        phases, engine = Phases(), self.engine
        model, objective, unpack = engine.blocks.model, engine.objective, self.unpack
        run_block, logits = model.run_block, model.logits
        offspring, minibatch = self._draw(count, tokens)
        try:
            self.unpack = phases.wrapped("unpacking", unpack)
            model.run_block = phases.wrapped("blocks", run_block)  # type: ignore[method-assign]
            model.logits = phases.wrapped("head", logits)  # type: ignore[method-assign]
            engine.objective = type(objective)(
                phases.wrapped("KL", objective.prepare),
                phases.wrapped("KL", objective.score),
                objective.needs_teacher,
                objective.positions_lost,
            )
            with phases.measure():
                self._judge_engine(offspring, minibatch)
        finally:
            self.unpack, model.run_block, model.logits, engine.objective = unpack, run_block, logits, objective
        total = sum(phases.seconds.values())
        for phase, seconds in sorted(phases.seconds.items(), key=lambda item: -item[1]):
            rate = phases.flops.get(phase, 0.0) / 1e9 / seconds
            reached = f"  {rate:.0f} GFLOP/s, {100 * rate / peak:.0f} % of torch.mm" if rate else ""
            rest = ": the rest" if phase in ("blocks", "head") else ""
            print(f"  {100 * seconds / total:5.1f} %  {phase}{rest}{reached}")

    def _draw(self, count: int, tokens: int) -> tuple[NDArray[np.int16], Minibatch]:
        """Offspring of the parent, with their variants made, and whole sequences."""
        offspring = make_offspring(self.parent, self.space, count, self.rng)
        for candidate in (self.parent, *offspring):
            for unit, level in zip(self.space.units, candidate, strict=True):
                self.variants.make(unit.block, unit.layer, unit.levels[level].label)
        return offspring, self.engine.draw(tokens, self.rng)

    def _judge_plain(self, offspring: NDArray[np.int16], minibatch: Minibatch) -> list[float]:
        return self.plain.evaluate(offspring, minibatch)

    def _judge_engine(self, offspring: NDArray[np.int16], minibatch: Minibatch) -> list[float]:
        return [judgement.fitness for judgement in self.engine.evaluate(offspring, minibatch)]

    def _engine_bytes(self) -> int:
        """What the engine holds between evaluations: unpacked weights, what lies outside blocks, the teacher."""
        model = self.engine.blocks.model.model
        parameters = sum(parameter.nbytes for parameter in model.parameters() if not parameter.is_meta)
        dense = self.engine.dense
        return parameters + self.engine.blocks.cache.bytes + (dense.nbytes if dense is not None else 0)


def search_space(results: Run) -> Space:
    """All linear layers at 2 to 6 bits; layers of the same size trade."""
    units = []
    for row in read_table(results.layers, LAYERS).itertuples():
        size = int(row.parameters)
        levels = tuple(Level(str(bits), float(bits), bits * size, bits * size // 8) for bits in WIDTHS)
        units.append(Unit(row.name, int(row.block), row.layer, str(size), size, levels))
    return make_space(BITS, units, TARGET, "benchmark")


def gigabytes(count: float) -> str:
    """Bytes as GB."""
    return f"{count / 1e9:.2f} GB"


if __name__ == "__main__":
    main()
