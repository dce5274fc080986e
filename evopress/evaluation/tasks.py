"""lm-eval tasks on a finished model, through lm-eval's Python API."""

import json
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from evopress.artifacts.atomic import write_text
from evopress.artifacts.exports import model_folder
from evopress.artifacts.paths import DENSE
from evopress.artifacts.provenance import Provenance, read_model_fingerprint
from evopress.artifacts.tables import TASKS, write_table
from evopress.config.context import StageContext
from evopress.config.evaluation import TaskSettings
from evopress.config.tasks import require_tasks, runs_generated_code
from evopress.models.verify import check_model
from evopress.util.device import working_dtype
from evopress.util.errors import ConfigError
from evopress.util.progress import log

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

    from evopress.evaluation.harness import ReportingLM
    from evopress.evaluation.task_files import task_manager

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
