"""Rows of the Hugging Face hub's data sets, with patience for a network that fails."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from evopress.util.errors import DataError, brief
from evopress.util.progress import log
from evopress.util.retry import WAITS, causes, is_transient, patiently

Rows = Iterable[dict[str, Any]]


@dataclass(frozen=True)
class Split:
    """One split of a data set, and which files of it where not all are wanted."""

    id: str
    split: str
    name: str | None = None
    files: str | None = None
    revision: str | None = None
    streaming: bool = True
    seed: int | None = None
    """Chooses the order of the rows, or where they are streamed, of the files that hold them; None keeps it."""


WIKITEXT2 = "Salesforce/wikitext", "wikitext-2-raw-v1", "b08601e04326c79dfdd32d625aee71d232d685c3"
C4 = "allenai/c4", "607bd4c8450a42878aa9ddc051a65a055450ef87"
FINEWEB_EDU = "HuggingFaceFW/fineweb-edu", "sample-10BT", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"


def wikitext2(split: str) -> Split:
    """A split of wikitext-2-raw-v1; small, so it is kept in the hub cache."""
    id, name, revision = WIKITEXT2
    return Split(id, split, name=name, revision=revision, streaming=False)


def c4_train() -> Split:
    """First of the 1,024 training shards of C4 (en), from which the field calibrates."""
    id, revision = C4
    return Split(id, "train", files="en/c4-train.00000-of-01024.json.gz", revision=revision)


def c4_validation() -> Split:
    """First of the eight validation shards of C4 (en), on which the field's tables evaluate; kept in the hub cache."""
    id, revision = C4
    return Split(id, "validation", files="en/c4-validation.00000-of-00008.json.gz", revision=revision, streaming=False)


def fineweb_edu() -> Split:
    """The sample of 10 billion tokens of FineWeb-Edu, read only as far as needed."""
    id, name, revision = FINEWEB_EDU
    return Split(id, "train", name=name, revision=revision)


def location(id: str) -> str:
    """Where `datasets` finds a data set: its id on the hub."""
    return id


def open_split(split: Split) -> Rows:
    """Open a split; rows are dictionaries by column."""
    from datasets import load_dataset

    rows = load_dataset(
        location(split.id),
        name=split.name,
        data_files=None if split.files is None else {split.split: split.files},
        split=split.split,
        revision=split.revision,
        streaming=split.streaming,
        # A card states the sizes of whole splits, which some of their files never have.
        verification_mode="basic_checks" if split.files is None else "no_checks",
    )
    if split.seed is None:
        return rows
    return rows.shuffle(split.seed, buffer_size=1) if split.streaming else rows.shuffle(split.seed)


def read_rows(
    split: Split, open_rows: Callable[[Split], Rows] = open_split, sleep: Callable[[float], None] = time.sleep
) -> Iterator[dict[str, Any]]:
    """Rows of a split in order; after a lost connection it is opened again at once and goes on at the same row.

    Where that fails, it is tried again, ever later. A row that arrives starts the waits anew.

    Raises:
        DataError: the data set cannot be found or read, or the hub stays away.
    """
    title, done = _title(split), 0

    def lasting(error: Exception) -> DataError | None:
        """What to say of an error that trying again does not mend; None of others."""
        return None if is_transient(error) else DataError(f"{title}: {_lasting(error)}")

    def away(attempts: int, reason: str) -> DataError:
        """The error of a hub that stays away."""
        return DataError(
            f"{title}: the hub did not answer in {attempts} attempts ({reason}); try again later, or use source: file"
        )

    def opened() -> Iterator[dict[str, Any]]:
        """The rows that are left, of which the first has arrived."""
        return _rows_from(done, open_rows(split))

    while True:
        rows = patiently(opened, WAITS, title, lasting, away, sleep=sleep)
        try:
            for row in rows:
                done += 1
                yield row
            return
        except Exception as error:
            if (final := lasting(error)) is not None:
                raise final from error
            log.warning("%s: lost the connection at row %d (%s); opening it again", title, done, brief(error))


def _rows_from(number: int, rows: Rows) -> Iterator[dict[str, Any]]:
    """Rows from ``number`` on, of which the first has arrived."""
    left = islice(rows, number, None)
    first = list(islice(left, 1))
    return chain(first, left)


def _lasting(error: BaseException) -> str:
    """What is wrong where another attempt would not help, and what to do."""
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled

    links = causes(error)
    offline = OfflineModeIsEnabled.__name__  # `datasets` only names it
    if any(isinstance(each, OfflineModeIsEnabled) or offline in str(each) for each in links) or _cache_alone(error):
        return (
            f"not in the cache, and {_forbidding()} forbids to fetch it; unset it where there is a network, and either "
            "bring the cache from there (HF_HOME), or the text as files for source: file"
        )
    if any(isinstance(each, GatedRepoError) or "gated" in str(each) for each in links):
        return f"gated; accept its conditions on the hub and log in with `hf auth login` ({error})"
    return f"cannot be read: {error}; check its id, name and split"


def _cache_alone(error: BaseException) -> bool:
    """Whether `datasets` looked in its cache alone, as without a network."""
    from datasets import config

    missing = isinstance(error, (FileNotFoundError, ConnectionError)) or "find cache" in str(error)
    return bool(config.HF_HUB_OFFLINE) and missing


def _forbidding() -> str:
    """The variable that forbids the network."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    return next((name for name in names if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")), names[0])


def _title(split: Split) -> str:
    return " ".join(part for part in (split.id, split.name, split.split) if part)
