"""What tests of the report share: a run's measurements made up, and a reader of the page."""

import json
import math
from html.parser import HTMLParser

import pandas as pd
from finished_run import provenance

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import PERPLEXITY, PROGRESS, RUNTIME, TASKS, TRACE, write_table


def measure(run: Run, model: str, perplexity: float, kl: float, accuracy: float) -> None:
    error = 0.01 if kl else math.nan
    rows = [
        (model, "novels", perplexity, kl, error, 1 - kl / 2, error, 100),
        (model, "letters", 2 * perplexity, 2 * kl, error, 1 - kl, error, 50),
    ]
    write_table(pd.DataFrame(rows, columns=PERPLEXITY.names), run.perplexity(model), PERPLEXITY, provenance())
    rows = [(model, "quiz", "acc", "none", accuracy, 0.01, 40), (model, "quiz", "loss", "none", 1.0, math.nan, 40)]
    write_table(pd.DataFrame(rows, columns=TASKS.names), run.tasks(model), TASKS, provenance())
    better = {"higher_is_better": {"quiz": {"acc": True, "loss": False}}}
    run.tasks_json(model).write_text(json.dumps(better))


def measure_in_runtime(run: Run, model: str, megabytes: float, ratio: float, digest: str = "") -> None:
    file = (0.05, int(megabytes * 1e6), digest, int(megabytes * 2e6), 1000 * ratio, 100 * ratio, ratio, ratio)
    rows = [
        (model, text, 100, 0.006, 12.75, 12.5, *file, 2, "llama.cpp (xllamacpp 1)") for text in ("novels", "letters")
    ]
    write_table(pd.DataFrame(rows, columns=RUNTIME.names), run.runtime(model), RUNTIME, provenance())


def trace() -> pd.DataFrame:
    rows = []
    for generation in range(4):
        for step, tokens in enumerate((100, 1000)):
            for candidate in (-1, 0):
                accepted = step == 1 and candidate == 0
                fitness = 1.0 / (1 + generation) + (0 if accepted else 0.5)
                rows.append((generation, step, candidate, tokens, fitness, [fitness], [0], accepted))
    return pd.DataFrame(rows, columns=TRACE.names)


def progress() -> pd.DataFrame:
    unit = "model.layers.0.self_attn."
    rows = [
        ("uniform", 0, 0, 0.0, 0.9, 24, [], []),
        ("best", 0, 0, 0.0, 0.8, 24, [], []),
        ("best", 1, 2200, 1.5, 0.6, 24, [f"{unit}q_proj"], [f"{unit}k_proj", f"{unit}v_proj"]),
        ("best", 3, 6600, 4.5, 0.5, 24, [f"{unit}q_proj"], [f"{unit}k_proj"]),
    ]
    return pd.DataFrame(rows, columns=PROGRESS.names)


def write_way(run: Run, search: str, *, evolved: bool) -> None:
    """Trace and progress of an evolution, or of a strategy that evaluates nothing."""
    write_table(trace() if evolved else trace()[:0], run.trace(search), TRACE, provenance())
    write_table(progress() if evolved else progress()[:0], run.progress(search), PROGRESS, provenance())


class Page(HTMLParser):
    """Collects table rows, and whatever would be fetched."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.fetched, self.tags, self.cell = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.fetched += [value for name, value in attributes if name in ("src", "href") and not value.startswith("#")]
        if tag == "tr":
            self.rows.append([])
        self.cell = "" if tag in ("td", "th") else self.cell

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.rows[-1].append(self.cell)
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data
