"""The comparison tables: models by size, perplexity, divergence and task metrics, and their files in the runtime."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import pyarrow as pa

from evopress.artifacts.exports import weights_bytes
from evopress.artifacts.paths import DENSE, Run
from evopress.artifacts.provenance import require_same_model
from evopress.artifacts.tables import PERPLEXITY, RUNTIME, TASKS, read_provenance, read_table
from evopress.compression.size import dense_size, size_of
from evopress.export.exporters import EXPORTERS
from evopress.models.checkpoint import Checkpoint
from evopress.models.modules import KINDS
from evopress.search.configuration import Configuration
from evopress.util.errors import ArtifactError


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
        text = f"{self.value:,.{digits}f}" if math.isfinite(self.value) else str(self.value)
        return text if math.isnan(self.stderr) else f"{text} ±{self.stderr:.{digits}f}"


@dataclass
class Comparison:
    """Models by name, in order, with a cell for each column that they were measured in."""

    columns: list[Column] = field(default_factory=list)
    rows: dict[str, dict[Column, Cell]] = field(default_factory=dict)

    def put(self, model: str, column: Column, cell: Cell) -> None:
        """Set a cell; columns keep the order in which they first come."""
        if column not in self.columns:
            self.columns.append(column)
        self.rows.setdefault(model, {})[column] = cell

    def is_best(self, model: str, column: Column) -> bool:
        """Whether all other compressed models are worse, by more than the standard error of the difference."""
        if model == DENSE or not column.better or column not in self.rows[model]:
            return False
        own = self.rows[model][column]
        others = [cells[column] for name, cells in self.rows.items() if name not in (DENSE, model) and column in cells]
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


def compare(run: Run, searches: Sequence[str], exports: Sequence[Path] = ()) -> Comparison:
    """Read what was measured of the dense model and of each search.

    Args:
        run: the run.
        searches: to compare.
        exports: folders of their models; the sizes of those are told whose size follows from the levels.

    Raises:
        ArtifactError: an artifact is missing, damaged, or of another model.
    """
    comparison = Comparison()
    configurations = {search: Configuration.read(run, search).table for search in searches}
    _put_sizes(comparison, run, configurations)
    _put_files(comparison, run, exports)
    models = [DENSE, *searches]
    tables = {model: _checked(run, run.perplexity(model), PERPLEXITY) for model in models}
    for title, key, digits in (("perplexity", "perplexity", 2), ("KL", "kl", 4)):
        for model, table in tables.items():
            for row in table.to_dict("records"):
                comparison.put(model, Column(title, row["dataset"], digits, "low"), Cell(row[key]))
    for model in models:
        _put_tasks(comparison, run, model)
    return comparison


def compare_in_runtime(run: Run, models: Sequence[str]) -> Comparison:
    """Read what the files of ``models`` did in llama.cpp. No model is marked as best: machines are too noisy for that.

    Raises:
        ArtifactError: an artifact is missing, damaged, or of another model.
    """
    comparison = Comparison()
    tables = {
        f"{model} (F16)" if model == DENSE else model: _checked(run, run.runtime(model), RUNTIME) for model in models
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
