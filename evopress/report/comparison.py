"""The comparison tables: models by size, perplexity, divergence and task metrics, and their files in the runtime."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import pyarrow as pa

from evopress.artifacts.exports import weights_bytes
from evopress.artifacts.manifest import load_manifest
from evopress.artifacts.paths import DENSE, Run
from evopress.artifacts.provenance import require_same_model
from evopress.artifacts.tables import PERPLEXITY, RUNTIME, TASKS, read_provenance, read_table
from evopress.compression.size import dense_size, size_of
from evopress.export.exporters import EXPORTERS
from evopress.models.checkpoint import Checkpoint
from evopress.models.modules import KINDS
from evopress.search.configuration import Configuration
from evopress.util.errors import ArtifactError
from evopress.util.metrics import with_error


@dataclass(frozen=True)
class Column:
    """A quantity that models are compared in."""

    title: str
    subtitle: str
    digits: int
    better: str = ""
    """``low``, ``high``, or nothing where no value is better than another."""


@dataclass(frozen=True)
class Cell:
    """A value, and its standard error where one is known."""

    value: float
    stderr: float = math.nan

    def noise(self, other: "Cell") -> float:
        """Standard error of the difference to another cell; 0 where none is known."""
        return math.hypot(*(stderr for stderr in (self.stderr, other.stderr) if not math.isnan(stderr)))

    def text(self, digits: int) -> str:
        """Rounded, with the standard error if there is one."""
        return with_error(self.value, self.stderr, digits)


@dataclass
class Comparison:
    """Models by name, in order, with a cell for each column that they were measured in."""

    columns: list[Column] = field(default_factory=list)
    rows: dict[str, dict[Column, Cell]] = field(default_factory=dict)
    dense: str = DENSE
    """Name that the uncompressed model has here."""

    def put(self, model: str, column: Column, cell: Cell) -> None:
        """Set a cell; columns keep the order in which they first come."""
        if column not in self.columns:
            self.columns.append(column)
        self.rows.setdefault(model, {})[column] = cell

    def is_best(self, model: str, column: Column) -> bool:
        """Whether all other compressed models are worse, by more than the standard error of the difference if known."""
        if model == self.dense or not column.better or column not in self.rows[model]:
            return False
        own = self.rows[model][column]
        names = self.rows.keys() - {self.dense, model}
        others = [self.rows[name][column] for name in names if column in self.rows[name]]
        sign = 1 if column.better == "low" else -1
        return bool(others) and all(sign * (other.value - own.value) > own.noise(other) for other in others)

    def text(self, model: str, column: Column) -> str:
        """Text of a cell; a dash where the model was not measured."""
        cell = self.rows[model].get(column)
        return "-" if cell is None else cell.text(column.digits)


DROPPED = {kind: Column("dropped", f"{kind} modules", 0) for kind in KINDS}
PARAMETERS = Column("parameters", "millions, in use", 1)
BITS = Column("bits", "per weight", 2)
SIZE = Column("packed size", "MB", 1)
FILE = Column("file", "MB", 1)
FILE_BITS = Column("file", "bits/parameter", 2)


def compare(
    run: Run, searches: Sequence[str], exports: Sequence[Path] = (), on_tasks: Sequence[str] = ()
) -> Comparison:
    """Read what was measured of the dense model and of each search.

    Args:
        run: the run.
        searches: to compare.
        exports: folders of their models; the sizes of those are told whose size follows from the levels.
        on_tasks: models that have answered lm-eval's tasks, of the dense one and the searches.

    Raises:
        ArtifactError: an artifact is missing, damaged, or of another model.
    """
    comparison = Comparison()
    configurations = {search: Configuration.read(run, search).table for search in searches}
    _put_sizes(comparison, run, configurations)
    _put_files(comparison, run, exports)
    models = [DENSE, *searches]
    tables = {model: _checked(run, run.perplexity(model), PERPLEXITY) for model in models}
    for key, error in (("perplexity", None), ("kl", "kl_stderr")):
        for model, table in tables.items():
            for row in table.to_dict("records"):
                cell = Cell(row[key], math.nan if error is None else row[error])
                comparison.put(model, measured_column(key, row["dataset"]), cell)
    for model, table in tables.items():
        for row in table.to_dict("records"):
            cell = Cell(row["agreement"], row["agreement_stderr"])
            comparison.put(model, Column("agreement", row["dataset"], 3, "high"), cell)
    for model in on_tasks:
        _put_tasks(comparison, run, model)
    return comparison


def measured_column(key: str, text: str) -> Column:
    """Column of a quantity on a text: ``perplexity`` or ``kl``."""
    return Column("KL", text, 4, "low") if key == "kl" else Column(key, text, 2, "low")


def compare_in_runtime(run: Run, models: Sequence[str]) -> Comparison:
    """Read what the files of ``models`` did in llama.cpp. No model is marked as best: machines are too noisy for that.

    Raises:
        ArtifactError: an artifact is missing, damaged, or of another model.
    """
    comparison = Comparison(dense=f"{DENSE} (F16)")
    tables = {
        comparison.dense if model == DENSE else model: _checked(run, run.runtime(model), RUNTIME) for model in models
    }
    for model, table in tables.items():
        file = table.iloc[0]
        comparison.put(model, Column("file", "MB", 1), Cell(file["file_bytes"] / 1e6))
        comparison.put(model, Column("memory", "MB", 1), Cell(file["resident_bytes"] / 1e6))
        for work in ("prompt", "generation"):
            comparison.put(model, Column(work, "tokens/s", 1), Cell(file[f"{work}_speed"]))
            comparison.put(model, Column(work, "x F16", 2), Cell(file[f"{work}_ratio"]))
    for model, table in tables.items():
        for row in table.to_dict("records"):
            text = row["dataset"]
            comparison.put(model, Column("perplexity", f"{text}, llama.cpp", 2), Cell(row["perplexity"]))
            comparison.put(model, Column("perplexity", f"{text}, evopress", 2), Cell(row["own_perplexity"]))
            comparison.put(model, Column("KL", f"{text}, evopress || llama.cpp", 5), Cell(row["kl"]))
    return comparison


def _put_sizes(comparison: Comparison, run: Run, configurations: Mapping[str, pd.DataFrame]) -> None:
    """Sizes of all models, in what the families of their levels count."""
    checkpoint = Checkpoint(run.model)
    compressed = {search: size_of(run, configuration) for search, configuration in configurations.items()}
    layers = next((configurations[name] for name, size in compressed.items() if size.family), None)
    for model, size in {DENSE: dense_size(checkpoint, layers), **compressed}.items():
        if size.depth:
            for kind, column in DROPPED.items():
                comparison.put(model, column, Cell(size.depth.dropped.count(kind)))
            comparison.put(model, PARAMETERS, Cell(size.depth.in_use / 1e6))
        if size.family:
            comparison.put(model, Column(*size.family.column), Cell(size.average))
        if size.family or (model == DENSE and (layers is not None or not configurations)):
            comparison.put(model, BITS, Cell(size.bits))
        comparison.put(model, SIZE, Cell(size.total_bytes / 1e6))
    if PARAMETERS in comparison.columns:
        comparison.put(DENSE, PARAMETERS, Cell(sum(checkpoint.elements().values()) / 1e6))


def _put_files(comparison: Comparison, run: Run, exports: Sequence[Path]) -> None:
    """Sizes of files as they are, of the first export of each search whose size follows from the levels."""
    sized = {EXPORTERS.name_of(exporter): exporter.weights for exporter in EXPORTERS.plugins if exporter.has_size}
    parameters = sum(Checkpoint(run.model).elements().values())
    source = load_manifest(run.model_manifest, "model").get("origin", {}).get("gguf_bytes")
    if source and any(folder.name in sized for folder in exports):  # that file counts as dense
        comparison.put(DENSE, FILE, Cell(source / 1e6))
        comparison.put(DENSE, FILE_BITS, Cell(8 * source / parameters))
    for folder in exports:
        search, exporter = folder.parent.name, folder.name
        if exporter in sized and FILE not in comparison.rows[search]:
            size = weights_bytes(run, search, exporter, sized[exporter])
            comparison.put(search, FILE, Cell(size / 1e6))
            comparison.put(search, FILE_BITS, Cell(8 * size / parameters))


def _put_tasks(comparison: Comparison, run: Run, model: str) -> None:
    table = _checked(run, run.tasks(model), TASKS)
    better = _higher_is_better(run.tasks_json(model))
    for row in table.to_dict("records"):
        task, metric = row["task"], row["metric"]
        name = metric if row["filter"] == "none" else f"{metric} ({row['filter']})"
        column = Column(task, name, 3, "high" if better.get(task, {}).get(metric, True) else "low")
        comparison.put(model, column, Cell(row["value"], row["stderr"]))


def _higher_is_better(path: Path) -> dict[str, dict[str, bool]]:
    """What lm-eval's JSON says of each task's metrics."""
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("higher_is_better", {})
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing; run the stage that writes it") from None
    except (OSError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{path}: damaged ({error!r}); delete it and run again to remake it") from error


def _checked(run: Run, path: Path, schema: pa.Schema) -> pd.DataFrame:
    """A table, after checking that it was made for the model in ``results``."""
    table = read_table(path, schema)
    require_same_model(run, read_provenance(path), path)
    return table


# The comparison as plain text, for the end of a run on a terminal.

WIDTH = 100


def summary(
    comparison: Comparison,
    run: Run,
    title: str,
    exports: Sequence[Path],
    leaks: Sequence[str] = (),
    runtime: Comparison | None = None,
    fronts: Iterable[str] = (),
) -> str:
    """Title, comparison table, and where the models and the report lie; no table line is longer than WIDTH.

    ``exports`` are folders of models, ``leaks`` sentences on text that is not held out, and ``runtime`` compares files
    in llama.cpp, and ``fronts`` are tables of sizes.
    """
    lines = [title, ""]
    for table in tables(comparison):
        lines += [table, ""]
    if any(comparison.is_best(model, column) for model in comparison.rows for column in comparison.columns):
        lines += ["* better than all other compressed models, by more than the standard error, where one is known", ""]
    if runtime is not None and runtime.rows:
        lines += ["GGUF files in llama.cpp", ""]
        for table in tables(runtime):
            lines += [table, ""]
    for front in fronts:
        lines += [front, ""]
    for sentence in leaks:
        lines += [f"Warning: {sentence}", ""]
    places = {f"{folder.parent.name} as {folder.name}": _file_or_folder(folder) for folder in exports}
    places |= {"report": run.report}
    width = max(map(len, places))
    lines += [f"{name:<{width}}  {path}" for name, path in places.items()]
    return "\n".join(lines) + "\n"


def _file_or_folder(export: Path) -> Path:
    """What is handed to a runtime: the GGUF file, or the folder."""
    files = list(export.glob("*.gguf"))
    return files[0] if len(files) == 1 else export


def tables(comparison: Comparison) -> list[str]:
    """The comparison in as many tables as it takes for no line to be longer than WIDTH."""
    return ["\n".join(_table(comparison, columns)) for columns in _fit(comparison)]


def _fit(comparison: Comparison) -> list[list[Column]]:
    """Cut the columns into tables that are no wider than WIDTH, each of at least one column."""
    tables: list[list[Column]] = []
    first = max(map(len, ["model", *comparison.rows]))
    filled = 0
    for column in comparison.columns:
        width = 2 + max(map(len, _cells(comparison, column)))
        if not tables or filled + width > WIDTH:
            tables.append([])
            filled = first
        tables[-1].append(column)
        filled += width
    return tables


def _table(comparison: Comparison, columns: Sequence[Column]) -> list[str]:
    """Two lines of header, a rule, and a line for each model; numbers aligned by their last digit."""
    names = ["", "model", *comparison.rows]
    width = max(map(len, names))
    texts = [_cells(comparison, column) for column in columns]
    widths = [max(map(len, text)) for text in texts]
    lines = []
    for number, name in enumerate(names):
        cells = (f"  {text[number]:>{size}}" for text, size in zip(texts, widths, strict=True))
        lines.append(f"{name:<{width}}{''.join(cells)}".rstrip())
    return [*lines[:2], "-" * (width + sum(widths) + 2 * len(widths)), *lines[2:]]


def _cells(comparison: Comparison, column: Column) -> list[str]:
    """Header lines and values of a column; a star marks the best, a blank keeps the others in line."""
    values = [
        comparison.text(model, column) + ("*" if comparison.is_best(model, column) else " ")
        for model in comparison.rows
    ]
    return [f"{column.title} ", f"{column.subtitle} ", *values]
