"""What searches and evaluations found, as TensorBoard events; read from a run, which is left as it is."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import PERPLEXITY, TASKS, TRACE, read_table
from evopress.report.live import finished_rounds
from evopress.util.errors import ConfigError

_OWN = ".evopress"
"""How the names of our event files end."""


class Scalar(NamedTuple):
    """One point of one curve."""

    tag: str
    step: int
    value: float


def write_events(run: Run, folder: Path) -> dict[str, int]:
    """Write events into a folder for each model below ``folder``, in place of those that an earlier call wrote.

    Returns:
        Number of points by model: searches, finished or not, and the dense model.

    Raises:
        ConfigError: tensorboard is not installed.
        ArtifactError: a table is damaged.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("--tensorboard: is not installed; pip install -e '.[tensorboard]'") from error
    written: dict[str, int] = {}
    for model in models_of(run):
        points = [*search_scalars(run, model), *evaluation_scalars(run, model)]
        own = folder / run.root.name / model
        earlier = list(own.glob(f"*{_OWN}"))
        with SummaryWriter(own, filename_suffix=_OWN) as writer:
            for point in points:
                writer.add_scalar(point.tag, point.value, point.step)
        for path in earlier:
            path.unlink()
        written[model] = len(points)
    return written


def models_of(run: Run) -> list[str]:
    """Names of all searches that have begun, and of what was evaluated."""
    folders = (path for below in ("search", "evaluation") for path in (run.root / below).glob("*") if path.is_dir())
    return sorted({path.name for path in folders})


def search_scalars(run: Run, search: str) -> Iterator[Scalar]:
    """Fitness that each round accepted, on its own tokens, and the tokens that were judged up to its end."""
    tokens = 0
    for number, rows in sorted(rounds_of(run, search).items()):
        tokens += sum(row["tokens"] for row in rows)
        accepted = [row["fitness"] for row in rows if row["accepted"]]
        if accepted:
            yield Scalar("search/fitness of the best", number, min(accepted))
        yield Scalar("search/tokens judged", number, tokens)


def rounds_of(run: Run, search: str) -> dict[int, list[dict[str, Any]]]:
    """Evaluations by round: of a finished search, or as far as one has got."""
    rounds: dict[int, list[dict[str, Any]]] = {}
    rows: list[Any] = [row for finished in finished_rounds(run, search) for row in finished["rows"]]
    if run.trace(search).exists():
        rows = read_table(run.trace(search), TRACE).to_dict("records")
    for row in rows:
        rounds.setdefault(int(row["generation"]), []).append(row)
    return rounds


def evaluation_scalars(run: Run, model: str) -> Iterator[Scalar]:
    """What was measured of a model, as single points."""
    if run.perplexity(model).exists():
        for row in read_table(run.perplexity(model), PERPLEXITY).to_dict("records"):
            yield Scalar(f"perplexity/{row['dataset']}", 0, row["perplexity"])
            yield Scalar(f"KL to dense/{row['dataset']}", 0, row["kl"])
    if run.tasks(model).exists():
        for row in read_table(run.tasks(model), TASKS).to_dict("records"):
            yield Scalar(f"tasks/{row['task']} {row['metric']}", 0, row["value"])
