"""`python -m evopress import-config`: check a text configuration against a model, and print settings that use it.

Nothing is run: the shape of the model and the sizes of its variants follow from the settings and the model's config.
What is printed is an overlay for Snakemake, with the facts as comments.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from evopress.artifacts.paths import Run
from evopress.cli.output import add_output_arguments, emit
from evopress.config.command_line import snakemake_command
from evopress.search.configuration import parse_candidate, require_budget
from evopress.search.text_format import read_text
from evopress.util.errors import ConfigError
from evopress.workflow.loading import DEFAULT, combined, read_yaml
from evopress.workflow.settings import Settings, lay_over


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("file", type=Path, help="text configuration: `layer: level` or dropped modules, line by line")
    parser.add_argument("search", help="name that the search shall have")
    parser.add_argument("config", nargs="*", type=Path, help=f"files laid over {DEFAULT}, one after the other")
    parser.add_argument("--variants", help="variants that the levels are of, if the search is not in the settings")
    parser.add_argument("--target", type=float, help="budget, if the search is not in the settings")
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Check the file and print the settings, or write them."""
    values = combined(map(read_yaml, arguments.config))
    search = _search(values, arguments)
    settings = Settings.load(lay_over(values, {"searches": {arguments.search: search}}))
    facts = _facts(settings, arguments.search, arguments.file, arguments.config)
    overlay = yaml.safe_dump({"searches": {arguments.search: search}}, sort_keys=False)
    emit("".join(f"# {line}\n" for line in facts) + overlay, arguments.output, force=arguments.force)


def _search(values: Mapping[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Settings of the imported search; variants and target are those that the settings name, unless others are asked.

    Raises:
        ConfigError: there are none.
    """
    Settings.load(values)
    named = values.get("searches", {}).get(arguments.search) or {}
    asked = {"variants": arguments.variants, "target": arguments.target}
    search = {key: named.get(key) if value is None else value for key, value in asked.items()}
    if unknown := [f"--{key}" for key, value in search.items() if value is None]:
        raise ConfigError(f"searches.{arguments.search}: is not in the settings; give {' and '.join(unknown)}")
    return {"strategy": "imported", **search, "file": arguments.file.as_posix()}


def _facts(settings: Settings, name: str, path: Path, configs: Sequence[Path]) -> list[str]:
    """What the file comes to; ``configs`` are those of the settings, for the command that fetches the model.

    Raises:
        ConfigError: it does not fit the model, the variants or the target.
    """
    # Only here: settings are checked before transformers is imported.
    from evopress.cli.configuration_facts import facts_of
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
    table = shape.table(settings.variants[search.variants], f"variants.{search.variants}")
    where = f"searches.{name}.file: {path}"
    file = file_of(settings.model, results, shape, search.target)
    problem = problem_of(
        table, search.variants, search.target, "none", f"searches.{name}", search.tied, search.levels, file
    )
    candidate = parse_candidate(text, problem.space, shape.blocks, where)
    require_budget(problem, candidate, search.target, where)
    return [*facts_of(problem, candidate, search.target), *uncounted(settings.model, results, {name: search})]
