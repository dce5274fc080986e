"""The tokens of each data set: written once, read by every later stage."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

import numpy as np
import pandas as pd
import torch

from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import Provenance, read_model_fingerprint
from evopress.artifacts.tables import TOKENS, read_table, write_table
from evopress.config.data import Role, TextSettings
from evopress.data.documents import Corpus, shuffled
from evopress.data.encoder import (
    Encoded,
    Encoder,
    Window,
    check_positions,
    check_vocabulary,
    choose,
    load_tokenizer,
    make_encoder,
    pack,
)
from evopress.data.sources import open_corpus
from evopress.util.errors import ArtifactError, DataError
from evopress.util.progress import log, progress

T = TypeVar("T")

BUFFER = 10_000
"""Documents of a stream that are shuffled together."""


def write_tokens(
    dataset: str, role: Role, settings: TextSettings, run: Run, *, trust_remote_code: bool = False
) -> None:
    """Write the tokens of one data set, in the order in which they are to be used.

    Args:
        dataset: ``calibration``, ``search`` or the name of an evaluation set.
        role: evaluation keeps the text's order and takes its first windows; the other roles choose by the seed.
        settings: where the text comes from, and how much of it.
        run: where the model's tokenizer lies and the table goes.
        trust_remote_code: run a tokenizer's own code.

    Raises:
        DataError: the text is missing, empty or too short, or its sequences are too long for the model.
        ModelError: the tokenizer is missing or belongs to another model.
        ArtifactError: the model is not there, or the table cannot be written.
    """
    where = f"data.evaluation.{dataset}" if role == "evaluation" else f"data.{role}"
    provenance = Provenance("calibration", settings.model_dump_json(), read_model_fingerprint(run))
    check_positions(settings.sequence_length, run.model, where, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(run.model, trust_remote_code=trust_remote_code)
    encoder = make_encoder(tokenizer, settings.bos, where, _model_type(run))
    windows = make_windows(open_corpus(settings, role), encoder, settings, where)
    check_vocabulary(np.concatenate([window.tokens for window in windows]), tokenizer, run.model)
    write_table(to_frame(windows, encoder.start), run.tokens(dataset), TOKENS, provenance)
    log.info("%s: %d sequences of %d tokens", where, len(windows), settings.sequence_length)


def read_tokens(run: Run, dataset: str) -> torch.Tensor:
    """Tokens of a data set, int64 [sequences, length].

    Raises:
        ArtifactError: missing, damaged, or with rows of different lengths.
    """
    path = run.tokens(dataset)
    rows = read_table(path, TOKENS)["tokens"].to_list()
    if not rows or any(row is None or len(row) != len(rows[0]) for row in rows):
        raise ArtifactError(f"{path}: damaged (rows are missing or differ in length); delete it and run again")
    tokens = np.stack(rows)
    if tokens.dtype.kind != "i" or not tokens.size or tokens.min() < 0:
        raise ArtifactError(f"{path}: damaged (not all are tokens); delete it and run again")
    return torch.from_numpy(tokens.astype(np.int64))


def read_counted(run: Run, dataset: str) -> torch.Tensor:
    """Positions that count where predictions are judged, bool [sequences, length].

    Those whose next token is a start token do not: it begins another document, of which nothing before it can know.
    Neither that it is not predicted (perplexity) nor how two models disagree about it (KL) says anything of a model.
    The last position of a sequence counts here; its next token is unknown.

    Raises:
        ArtifactError: the table is missing or damaged.
    """
    path = run.tokens(dataset)
    table = read_table(path, TOKENS)
    counted = np.ones((len(table), len(table["tokens"][0]) if len(table) else 0), dtype=bool)
    for row, starts in zip(counted, table["starts"], strict=True):
        if starts is None or np.any((starts < 0) | (starts >= len(row))):
            raise ArtifactError(f"{path}: damaged (start tokens are out of place); delete it and run again")
        row[starts[starts > 0] - 1] = False
    return torch.from_numpy(counted)


def make_windows(corpus: Corpus, encoder: Encoder, settings: TextSettings, where: str) -> list[Window]:
    """Encode, pack and choose the windows of a corpus; ``where`` is the setting that error messages name.

    Raises:
        DataError: the text is empty or too short.
    """
    rng = np.random.default_rng(settings.seed)
    length = settings.sequence_length
    count = None if settings.tokens is None else settings.tokens // length
    documents = shuffled(corpus.documents, BUFFER, rng) if corpus.order == "stream" else corpus.documents
    if corpus.order == "windows" or count is None:  # all documents are needed
        documents = list(documents)
        documents = _reported(documents, f"{where}: tokenizing", len(documents), "documents")
    encoded = Tally(encoder.encode(documents, length), between=0 if encoder.separator is None else 1)
    windows = pack(encoded, length, encoder.separator, encoder.start if encoder.every_window else None)
    if corpus.order != "windows" and count is not None:
        windows = _reported(windows, f"{where}: tokenizing", count, "sequences")
    chosen = choose(windows, count or corpus.usual_windows, rng if corpus.order == "windows" else None)
    if count is not None and len(chosen) < count and corpus.whole is not None:
        return make_windows(replace(corpus, documents=corpus.whole, whole=None), encoder, settings, where)
    _check_enough(corpus.source, encoded.total, len(chosen), count, length, where)
    return chosen


def _model_type(run: Run) -> str:
    """Type of the model by its config.json; empty if it cannot be told (others report that)."""
    try:
        config = json.loads((run.model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(config.get("model_type", "")) if isinstance(config, dict) else ""


class Tally:
    """Passes documents on and counts their tokens, for messages about how much text there is.

    Tokens ``between`` two documents count too, as they fill sequences like the others.
    """

    def __init__(self, documents: Iterable[Encoded], between: int) -> None:
        self.documents = documents
        self.between = between
        self.total = 0

    def __iter__(self) -> Iterator[Encoded]:
        for document in self.documents:
            if len(document.tokens):
                self.total += len(document.tokens) + (self.between if self.total else 0)
            yield document


def to_frame(windows: list[Window], start: int | None) -> pd.DataFrame:
    """Rows of the TOKENS schema; ``start`` is the start token."""
    return pd.DataFrame(
        {
            "sequence": np.arange(len(windows), dtype=np.int32),
            "documents": [list(window.documents) for window in windows],
            "tokens": [window.tokens for window in windows],
            "starts": [
                np.flatnonzero(window.tokens == (-1 if start is None else start)).astype(np.int32) for window in windows
            ],
        }
    )


def _reported(items: Iterable[T], description: str, total: int, unit: str) -> Iterator[T]:
    """Pass items on and report the progress."""
    with progress(description, total, unit) as bar:
        for item in items:
            yield item
            bar.advance()


def _check_enough(source: str, total: int, found: int, count: int | None, length: int, where: str) -> None:
    if not total:
        raise DataError(f"{where}: {source} holds no text")
    if not found:
        raise DataError(
            f"{where}: {source} has {total} tokens, fewer than one sequence of {length}; lower sequence_length"
        )
    if count is not None and found < count:
        raise DataError(
            f"{where}: asks for {count * length} tokens, but {source} has {total}, which fill {found} sequences of "
            f"{length}: set tokens to {found * length} or less"
        )
