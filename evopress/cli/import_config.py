"""`python -m evopress import-config`: check a text configuration against a model, and print settings that use it.

Nothing is run: the shape of the model and the sizes of its variants follow from the settings and the model's config.
What is printed is an overlay for Snakemake, with the facts as comments.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from evopress.artifacts.paths import Run
from evopress.config.base import snakemake_command
from evopress.search.configuration import parse_candidate, require_budget
from evopress.search.problem import SearchProblem
from evopress.search.space import Candidate
from evopress.search.target import SizeTarget, target_text
from evopress.search.text_format import read_text
from evopress.util.errors import ConfigError
from evopress.util.text import amount
from evopress.workflow.settings import Settings, combined, lay_over, read_yaml

# What a configuration comes to, in a line or two.


def facts_of(problem: SearchProblem, candidate: Candidate, target: float | SizeTarget) -> list[str]:
    """What the units come to and the target; then how many of them have each level.

    Args:
        problem: units and family.
        candidate: [units].
        target: of the search.
    """
    units = problem.space.units
    facts = f"{problem.describe(candidate)} (target {target_text(target)})"
    if problem.family.takes_modules:
        return [facts]
    levels = [layer.levels[level] for unit, level in zip(units, candidate, strict=True) for layer in unit.layers]
    counts = Counter(level.label for level in levels)
    by_level = ", ".join(f"{label}: {counts[label]}" for label in sorted(counts, key=_order))
    packed = sum(level.bytes for level in levels)
    return [f"{facts}, {amount(packed, 'B')} packed", f"layers by level: {by_level}"]


def _order(label: str) -> tuple[int, int, str]:
    """Bit-widths and steps by their number; labels that are none, such as patterns, before them by their text."""
    return (1, int(label), label) if label.removeprefix("-").removeprefix("+").isdigit() else (0, 0, label)


def imported(
    file: Path, name: str, configs: Sequence[Path], variants: str | None = None, target: float | None = None
) -> str:
    """Settings of a search that has the levels of a text configuration, with the facts as comments.

    Args:
        file: the text.
        name: of the search.
        configs: files of settings, laid over one another.
        variants: that the levels are of; those of the search in the settings, if not given.
        target: the same for its budget.

    Raises:
        ConfigError: the file does not fit the model, the variants or the target.
    """
    values = combined(map(read_yaml, configs))
    search = _search(values, file, name, {"variants": variants, "target": target})
    settings = Settings.load(lay_over(values, {"searches": {name: search}}))
    facts = _facts(settings, name, file, configs)
    return "".join(f"# {line}\n" for line in facts) + yaml.safe_dump({"searches": {name: search}}, sort_keys=False)


def _search(values: Mapping[str, Any], file: Path, name: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the imported search; variants and target are those that the settings name, unless others are asked.

    Raises:
        ConfigError: there are none.
    """
    Settings.load(values)
    named = values.get("searches", {}).get(name) or {}
    search = {key: named.get(key) if value is None else value for key, value in asked.items()}
    if unknown := [f"--{key}" for key, value in search.items() if value is None]:
        raise ConfigError(f"searches.{name}: is not in the settings; give {' and '.join(unknown)}")
    return {"strategy": "imported", **search, "file": file.as_posix()}


def _facts(settings: Settings, name: str, path: Path, configs: Sequence[Path]) -> list[str]:
    """What the file comes to; ``configs`` are those of the settings, for the command that fetches the model.

    Raises:
        ConfigError: it does not fit the model, the variants or the target.
    """
    # Only here: settings are checked before transformers is imported.
    from evopress.plan.shape import file_of, shape_of, uncounted
    from evopress.search.problem import problem_of

    search, results = settings.searches[name], Run(Path("results") / settings.name)
    text = read_text(path, f"searches.{name}.file")
    shape = shape_of(settings.model, results)
    if shape is None:
        raise ConfigError(
            "model: its layers are known only once it has been fetched; fetch it and check again:\n"
            f"    {snakemake_command(results.model_manifest, configs)}"
        )
    variants = search.sources[0]
    table = shape.table(settings.variants[variants], f"variants.{variants}")
    where = f"searches.{name}.file: {path}"
    file = file_of(settings.model, results, shape, search.target)
    problem = problem_of({variants: table}, search.constraints(f"searches.{name}", file))
    candidate = parse_candidate(text, problem.space, len(shape.blocks), where)
    require_budget(problem, candidate, search.target, where)
    return [*facts_of(problem, candidate, search.target), *uncounted(settings.model, results, {name: search})]
