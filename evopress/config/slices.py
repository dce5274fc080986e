"""The slice of the settings that each stage's result depends on, as normalised JSON, and nothing more.

Snakemake reruns a job whose slice has changed, so whatever cannot change a result stays out.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from evopress.artifacts.paths import DENSE, Results, manifest_path
from evopress.config.data import TextSettings
from evopress.config.evaluation import TaskSettings
from evopress.config.settings import Settings
from evopress.errors import ConfigError


def model_slice(settings: Settings) -> str:
    """Source and type of the weights; the number of blocks only says which jobs there are."""
    return settings.model.model_dump_json(exclude={"blocks"})


def text_of(settings: Settings, dataset: str) -> TextSettings:
    """Settings of ``calibration``, ``search`` or an evaluation set."""
    if dataset == "calibration":
        return settings.data.calibration
    return settings.data.search if dataset == "search" else settings.data.evaluation[dataset]


def tokens_slice(settings: Settings, dataset: str) -> str:
    """Text and windowing of one data set."""
    return text_of(settings, dataset).model_dump_json()


def hessians_slice(settings: Settings) -> str:
    """Shards: the order of summation shows in the last bits."""
    return settings.hessians.model_dump_json()


def variants_slice(settings: Settings, variants: str) -> str:
    """Method and levels of one database of variants."""
    return settings.variants[variants].model_dump_json()


def search_slice(settings: Settings, search: str) -> str:
    """One search."""
    return settings.searches[search].model_dump_json()


def tasks_slice(settings: Settings) -> str:
    """lm-eval tasks."""
    return settings.evaluation.tasks.model_dump_json()


def perplexity_slice(settings: Settings) -> str:
    """Names of the evaluation sets."""
    return json.dumps({"datasets": list(settings.data.evaluation)})


def expected_slices(settings: Settings, results: Results, blocks: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """One artifact of each job, with the slice that should have made it."""
    yield results.layers, model_slice(settings)
    for dataset in ("calibration", "search", *settings.data.evaluation):
        yield results.tokens(dataset), tokens_slice(settings, dataset)
    for block in blocks:
        yield manifest_path(results.hessian(block)), hessians_slice(settings)
        for variants in settings.variants:
            yield results.variant_table(variants, block), variants_slice(settings, variants)
    for search in settings.searches:
        yield results.configuration(search), search_slice(settings, search)
    for model in (DENSE, *settings.searches):
        yield results.perplexity(model), perplexity_slice(settings)
        yield results.tasks(model), tasks_slice(settings)


def task_files(tasks: TaskSettings) -> list[str]:
    """Files of the folder of own tasks: inputs of their evaluation, so that an edited task runs again.

    Raises:
        ConfigError: there is no such folder.
    """
    if tasks.include_path is None:
        return []
    folder = Path(tasks.include_path)
    if not folder.is_dir():
        raise ConfigError(f"evaluation.tasks.include_path: {tasks.include_path!r} is not a folder")
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return sorted(path.as_posix() for path in files if not path.name.startswith("."))
