"""lm-eval tasks on a finished model, through lm-eval's Python API."""

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import pandas as pd
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from evopress.artifacts.atomic import write_text
from evopress.artifacts.exports import model_folder
from evopress.artifacts.paths import DENSE
from evopress.artifacts.provenance import Provenance, read_model_fingerprint
from evopress.artifacts.tables import TASKS, write_table
from evopress.config.context import StageContext
from evopress.config.evaluation import TaskSettings
from evopress.config.tasks import require_tasks, runs_generated_code, unknown_task
from evopress.models.verify import check_model
from evopress.util.device import working_dtype
from evopress.util.errors import ConfigError, DataError
from evopress.util.progress import Progress, log, progress
from evopress.util.retry import WAITS, is_transient, patiently


class ReportingLM(HFLM):
    """HFLM with our progress lines in place of its bar, which would fill a log with thousands of lines."""

    def __init__(self, description: str, **options: Any) -> None:
        super().__init__(**options)
        self._description = description
        self._progress: Progress | None = None

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """Log-likelihoods of continuations."""
        return self._report(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """Log-likelihoods of whole texts."""
        return self._report(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """Generated continuations."""
        return self._report(super().generate_until, requests)

    def _report(self, run: Callable[..., Any], requests: list[Any]) -> Any:
        with progress(f"tasks of {self._description}", len(requests), "requests") as self._progress:
            answers = run(requests, disable_tqdm=True)
            # Requests that share a forward pass were counted once.
            self._progress.advance(max(0, len(requests) - self._progress.done))
        return answers

    def _model_call(self, inps: Any, *arguments: Any, **options: Any) -> Any:
        self._count(len(inps))
        return super()._model_call(inps, *arguments, **options)

    def _model_generate(self, context: Any, *arguments: Any, **options: Any) -> Any:
        self._count(len(context))
        return super()._model_generate(context, *arguments, **options)

    def _count(self, sequences: int) -> None:
        if self._progress is not None:
            self._progress.advance(sequences)


# lm-eval tasks by name, standard ones and those of a folder of your own.

LOCAL_FORMATS = ("json", "csv", "parquet", "text")
"""Values of `dataset_path` whose `data_files` are files rather than a data set of the hub."""


class PatientManager(TaskManager):
    """lm-eval's manager, which fetches the tasks' data again where the hub does not answer."""

    def load(self, task_list: Any) -> Any:
        """Build tasks, with their data.

        Raises:
            DataError: the data are not there, cannot be read, or the hub stays away.
        """
        return patiently(lambda: super(PatientManager, self).load(task_list), WAITS, "tasks", _lasting, _away)


def _lasting(error: Exception) -> DataError | None:
    """Of lm-eval, datasets, the hub's client, or of what tasks run themselves."""
    if is_transient(error):
        return None
    return DataError(f"evaluation.tasks: cannot be loaded ({error}); check the tasks' data")


def _away(attempts: int, reason: str) -> DataError:
    return DataError(
        f"evaluation.tasks: the hub did not answer in {attempts} attempts ({reason}); try again later, or use tasks "
        "whose data are local files"
    )


@contextmanager
def task_manager(names: Sequence[str], include_path: str | None) -> Iterator[TaskManager]:
    """Yield an lm-eval manager that knows ``names``.

    Relative `data_files` of YAML tasks under ``include_path`` are found beside the YAML file, wherever the job runs
    (lm-eval alone would look in the working directory). The index of the 14,000 standard tasks takes seconds to
    build, so it is left out where the folder has all the names.

    Raises:
        ConfigError: no such folder, or an unknown name; the message offers near ones.
    """
    folder = None if include_path is None else Path(include_path)
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"evaluation.tasks.include_path: {str(folder)!r} is not a folder")
    with TemporaryDirectory(prefix="evopress-tasks-") as overlay:
        paths = [folder] if folder else []
        if folder and write_overlays(folder, Path(overlay)):
            paths.append(Path(overlay))
        manager = PatientManager(include_path=paths, include_defaults=False)
        if not set(names) <= set(manager.all_tasks):
            manager = PatientManager(include_path=paths)
        check_names(names, manager.all_tasks)
        yield manager


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """Check that every name is a task, group or tag.

    Raises:
        ConfigError: one line per unknown name.
    """
    lines = [unknown_task(name, known) for name in sorted(set(names) - set(known))]
    if lines:
        raise ConfigError("\n".join(lines))


def write_overlays(folder: Path, overlay: Path) -> int:
    """For each task of ``folder`` with relative data files, write a YAML that includes it and gives absolute ones.

    Returns:
        The number of files written.
    """
    count = 0
    for path in sorted(folder.resolve().rglob("*.yaml")):
        config = _read(path)
        arguments = config.get("dataset_kwargs")
        if not isinstance(config.get("task"), str) or config.get("dataset_path") not in LOCAL_FORMATS:
            continue
        if isinstance(arguments, dict) and "data_files" in arguments:
            files = _absolute(arguments["data_files"], path.parent)
            content = {"include": str(path), "dataset_kwargs": {**arguments, "data_files": files}}
            (overlay / f"{count}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
            count += 1
    return count


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads lm-eval's `!function` as text and runs nothing."""


_Loader.add_constructor("!function", lambda loader, node: str(node.value))


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, or nothing: what lm-eval cannot read either is left to its own message."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _absolute(files: Any, folder: Path) -> Any:
    """Make paths in lm-eval's ``data_files`` (a path, a list, or a mapping of splits to either) absolute."""
    if isinstance(files, dict):
        return {split: _absolute(paths, folder) for split, paths in files.items()}
    if isinstance(files, list):
        return [_absolute(path, folder) for path in files]
    return files if "://" in str(files) else str(folder / str(files))


_UNCONFIRMED = re.compile(r"run task: (\S+) which is marked as unsafe")
"""What lm-eval says of a task that runs generated code."""


def evaluate_tasks(context: StageContext, search: str, settings: TaskSettings) -> None:
    """Run the tasks on the exported model of ``search``, or the dense one; write the TASKS table and lm-eval's JSON.

    Tasks whose data are local files need no network. Without tasks, an empty table and an empty JSON object.

    Raises:
        ArtifactError: the model is missing, cut short or of another model.
        ConfigError: an unknown task, or one that runs generated code, which the settings do not confirm.
        DataError: data of a task cannot be fetched or read.
    """
    run = context.run
    folder = model_folder(run, search)
    if search == DENSE:
        check_model(run)
    outcome: dict[str, Any] = {}
    if settings.names:
        outcome = _run(lambda: _load(folder, context), settings, search)
    write_text(run.tasks_json(search), _to_json(outcome))
    provenance = Provenance("evaluation", settings.model_dump_json(), read_model_fingerprint(run))
    write_table(task_rows(outcome, search), run.tasks(search), TASKS, provenance)


def task_rows(outcome: dict[str, Any], search: str) -> pd.DataFrame:
    """Rows of the TASKS schema from what lm-eval returns: one for each task or group, metric and filter."""
    rows = []
    for task, metrics in {**outcome.get("groups", {}), **outcome.get("results", {})}.items():
        samples = outcome.get("n-samples", {}).get(task, {}).get("effective", metrics.get("sample_len", 0))
        for key, value in metrics.items():
            metric, comma, chosen_filter = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{chosen_filter}")
            stderr = float(stderr) if isinstance(stderr, int | float) else float("nan")
            rows.append((search, task, metric, chosen_filter, float(value), stderr, int(samples)))
    return pd.DataFrame(rows, columns=TASKS.names)


def _load(folder: Path, context: StageContext) -> tuple[Any, Any]:
    """The model in its own dtype (or one that the device is fast in), and its tokenizer, from local files alone."""
    if not sys.stderr.isatty():
        disable_progress_bar()
    device, options = context.device, {"trust_remote_code": context.trust_remote_code, "local_files_only": True}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options)
    if (wider := working_dtype(model.dtype, device)) != model.dtype:  # else its float32 buffers would be rounded, too
        model = model.to(wider)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder, **options)


def _run(load: Callable[[], tuple[Any, Any]], settings: TaskSettings, search: str) -> dict[str, Any]:
    """What lm-eval returns; the model is loaded when the tasks are known to exist."""
    from lm_eval import simple_evaluate  # only here: an empty list of tasks need not wait for it

    _quieten()
    with task_manager(settings.names, settings.include_path) as manager:
        log.info("tasks of %s: %s", search, ", ".join(settings.names))
        require_tasks(settings)
        if settings.run_generated_code:
            os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # asked for by the metric of Hugging Face that runs the code
        model, tokenizer = load()
        try:
            outcome = simple_evaluate(
                model=ReportingLM(search, pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size),
                tasks=list(settings.names),
                num_fewshot=settings.num_fewshot,
                batch_size=settings.batch_size,
                limit=settings.limit,
                log_samples=False,
                task_manager=manager,
                confirm_run_unsafe_code=settings.run_generated_code,
            )
        except ValueError as error:
            if unconfirmed := _UNCONFIRMED.search(str(error)):  # a task that only Python code marks so
                raise ConfigError(runs_generated_code(unconfirmed[1])) from error
            raise
    return dict(outcome or {})


def _quieten() -> None:
    """Silence warnings about what is meant (overlaid tasks, a model that is loaded already), and bars in logs."""
    for name in ("lm_eval.tasks._index", "lm_eval.models.huggingface"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def _to_json(outcome: dict[str, Any]) -> str:
    from lm_eval.utils import handle_non_serializable

    return json.dumps(outcome, indent=2, ensure_ascii=False, default=handle_non_serializable) + "\n"
