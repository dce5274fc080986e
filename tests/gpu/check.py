"""Check that a machine's GPU gives what its CPU gives, and measure what it reaches; in under 8 minutes, offline:

    bash tests/gpu/check.sh

Random models are built on the spot: one of the shape of Llama 3.2 1B, two blocks of the shape of Llama 3.1 8B. That
takes 12 GB of disk below --folder, 24 GB of memory on the card at least, and 16 GB on the host. What is found goes to
check.json and check.txt in --out. On a machine without a card (or with --reduced) all of it runs with tiny models,
which shows that the checks themselves work, and nothing about speed.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS), str(TESTS / "benchmarks")]

import parity  # noqa: E402 (the modules that they share with tests and benchmarks lie on that path)
import processes  # noqa: E402
import rates  # noqa: E402
from random_models import Machine  # noqa: E402

from evopress.util.device import resolve_device  # noqa: E402

LIMIT_SECONDS = 420.0
"""After so long no further check starts: the last one, too, must end within 8 minutes."""
CHECKS: dict[str, Callable[[Machine], dict[str, object]]] = {
    "rate of matrix products": rates.matrix_rate,
    "Hessians as on the CPU": parity.hessians,
    "GPTQ codes as on the CPU": parity.codes,
    "fitness as on the CPU": parity.fitness,
    "device leases": processes.leases,
    "a search killed and resumed": processes.killed_search,
    "a group of one process": processes.one_rank,
    "Hessians of two blocks of an 8B": partial(rates.hessians, name="8B"),
    "GPTQ of two blocks of an 8B": partial(rates.variants, name="8B"),
    "two blocks of an 8B in little memory": parity.pressure,
    "Hessians of a 1B": partial(rates.hessians, name="1B"),
    "GPTQ of a 1B": partial(rates.variants, name="1B"),
    "a generation of a search, 1B": rates.generation,
    "evaluation of a 1B": rates.evaluation,
}


RATES = {
    "hessians": ("Hessians of two blocks of an 8B", "operations/s"),
    "variants": ("GPTQ of two blocks of an 8B", "operations/s"),
    "search": ("a generation of a search, 1B", "operations/s"),
    "unpack": ("a generation of a search, 1B", "unpacked, bytes/s"),
    "perplexity": ("evaluation of a 1B", "operations/s"),
}
"""What `evopress plan --rates` reads: the check that measures a rate, and which of its facts it is."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all checks; returns the number of those that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--reduced", action="store_true", help="tiny models on a card, too")
    parser.add_argument("--out", type=Path, default=Path("results/gpu-check"), help="folder of what is found")
    parser.add_argument("--folder", type=Path, help="where the scratch folder is made")
    parsed = parser.parse_args(arguments)
    disable_progress_bar()
    device = resolve_device(parsed.device)
    full = device.type == "cuda" and not parsed.reduced
    with tempfile.TemporaryDirectory(prefix="evopress-gpu-", dir=parsed.folder) as folder:
        machine = Machine(device, full, Path(folder))
        checks = run_checks(machine)
        found = {"machine": describe(machine), "checks": checks, "rates": rates_of(checks)}
    parsed.out.mkdir(parents=True, exist_ok=True)
    (parsed.out / "check.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (parsed.out / "check.txt").write_text(as_text(found), encoding="utf-8")
    failed = sum(check["outcome"] == "failed" for check in found["checks"].values())
    print(f"{failed} failed; {parsed.out / 'check.json'}, {parsed.out / 'check.txt'}")
    return failed


def describe(machine: Machine) -> dict[str, object]:
    """What the checks run on."""
    facts: dict[str, object] = {"device": str(machine.device), "sizes": "full" if machine.full else "reduced"}
    if machine.device.type == "cuda":
        card = torch.cuda.get_device_properties(machine.device)
        facts |= {"card": card.name, "memory, GB": card.total_memory / 1e9, "CUDA": torch.version.cuda}
    cpu = {"CPU threads": torch.get_num_threads(), "Python": platform.python_version(), "torch": torch.__version__}
    return facts | cpu


def run_checks(machine: Machine) -> dict[str, dict[str, object]]:
    """What each check found, and how long it took."""
    found: dict[str, dict[str, object]] = {}
    started = time.monotonic()
    for name, check in CHECKS.items():
        before = time.monotonic()
        if before - started > LIMIT_SECONDS:
            found[name] = {"outcome": "left out: no time"}
        else:
            outcome = run_check(check, machine)
            found[name] = {"outcome": outcome.pop("outcome"), "seconds": time.monotonic() - before, **outcome}
        print(line(name, found[name]), flush=True)
    return found


def rates_of(found: dict[str, dict[str, object]]) -> dict[str, object]:
    """Rates of those checks that have run."""
    return {rate: found[name][fact] for rate, (name, fact) in RATES.items() if fact in found.get(name, {})}


def run_check(check: Callable[[Machine], dict[str, object]], machine: Machine) -> dict[str, object]:
    """What a check found, or how it failed; the others go on."""
    try:
        return {"outcome": "ok", **check(machine)}
    except Exception as error:
        traceback.print_exc()
        return {"outcome": "failed", "error": f"{type(error).__name__}: {error}"}


def as_text(found: dict[str, dict]) -> str:
    """One line for the machine and for each check."""
    return "\n".join([facts_line(found["machine"]), *(line(*check) for check in found["checks"].items())]) + "\n"


def line(name: str, facts: dict[str, object]) -> str:
    """A check with what it found."""
    rest = {fact: value for fact, value in facts.items() if fact != "outcome"}
    return f"{name}: {facts['outcome']}\n    {facts_line(rest)}" if rest else f"{name}: {facts['outcome']}"


def facts_line(facts: dict[str, object]) -> str:
    """Facts in a row, numbers in three digits."""
    return "; ".join(f"{name} {f'{value:.3g}' if isinstance(value, float) else value}" for name, value in facts.items())


if __name__ == "__main__":
    sys.exit(min(main(), 100))
