"""From settings and role to documents: what each named source means.

The conventions of wikitext2 and C4 are those of the field's tables, as in the code of GPTQ (arXiv 2210.17323) and
SparseGPT (arXiv 2301.00774): one joined text, cut into windows.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import numpy as np

from evopress.config.data import C4, FileText, FineWebEdu, HubText, PythonDocs, Role, TextSettings, WikiText2
from evopress.data import hub
from evopress.data.documents import AnyDocument, Corpus, Document
from evopress.data.local import Column, named_files, read_files, row_document
from evopress.data.python_docs import python_docs
from evopress.data.sampling import PASSAGE, SMALL, is_small, sampled, text_bytes

C4_DOCUMENTS = 1100
C4_WINDOWS = 256
"""What the field's tables take of C4's first validation shard."""


def open_corpus(settings: TextSettings, role: Role) -> Corpus:
    """Documents of a text for one role; streams are opened when they are first read.

    Raises:
        DataError: the text cannot be found or read; partly while its documents are read.
    """
    match settings:
        case PythonDocs():
            corpus = Corpus("python_docs", python_docs(role))
        case WikiText2():
            corpus = wikitext2(role)
        case C4():
            corpus = c4(role)
        case FineWebEdu():
            corpus = Corpus("fineweb_edu", fineweb_edu(role), order="stream")
        case HubText():
            sample = settings.tokens is not None and role != "evaluation"
            corpus = Corpus(settings.id, hub_text(settings, sample=sample), order="stream" if sample else "windows")
        case FileText():
            corpus = file_text(settings, role)
    if role == "evaluation":  # held-out text is read in its own order, whatever the seed
        return replace(corpus, order="text")
    return corpus


def file_text(settings: FileText, role: Role) -> Corpus:
    """Local text, of which no more is read than a sample needs.

    Held-out text is the beginning of the files. Of text much larger than what is asked for, the other roles get random
    documents and passages; of other text, windows are chosen.

    Raises:
        DataError: there is no such file, or one cannot be read.
    """
    column = _column(settings)
    whole = read_files(settings.path, column)
    if settings.tokens is None:
        return Corpus(settings.path, whole)
    files = named_files(settings.path)
    if is_small(text_bytes([path for _, path in files], column), settings.tokens):
        return Corpus(settings.path, whole)
    if role == "evaluation":
        most = max(SMALL, 2 * PASSAGE * settings.tokens)
        return Corpus(settings.path, read_files(settings.path, column, most), order="text", whole=whole)
    rng = np.random.default_rng(settings.seed)
    drawn = sampled(files, column, settings.sequence_length, settings.tokens, rng)
    return Corpus(settings.path, drawn, order="text", whole=whole)


def _column(settings: FileText | HubText) -> Column:
    return Column(settings.column or ("messages" if settings.messages else "text"), settings.messages)


def wikitext2(role: Role) -> Corpus:
    """All rows, empty ones too, joined by blank lines into one text: test to evaluate, else train."""
    split = "test" if role == "evaluation" else "train"
    rows = (row["text"] for row in hub.read_rows(hub.wikitext2(split)))
    return Corpus("wikitext2", _joined(f"wikitext2/{split}", rows, "\n\n"))


def c4(role: Role) -> Corpus:
    """To evaluate, 1,100 documents of validation joined by spaces; else the documents of the first training shard."""
    if role == "evaluation":
        rows = (row["text"] for row in islice(hub.read_rows(hub.c4_validation()), C4_DOCUMENTS))
        return Corpus("c4", _joined("c4/validation", rows, " "), usual_windows=C4_WINDOWS)
    rows = (row["text"] for row in hub.read_rows(hub.c4_train()))
    return Corpus("c4", (Document(f"c4/train:{number}", text) for number, text in enumerate(rows)), order="stream")


def fineweb_edu(role: Role) -> Iterator[Document]:
    """Documents of FineWeb-Edu of one role: the data set has a single split, so its ids are dealt to the roles."""
    for row in hub.read_rows(hub.fineweb_edu()):
        if dealt_role(row["id"]) == role:
            yield Document(f"fineweb_edu/{row['id']}", row["text"])


def dealt_role(id: str) -> Role:
    """Role of a document by the hash of its id: two in five calibrate, two guide the search, one evaluates."""
    part = hashlib.sha256(id.encode()).digest()[0] % 5
    return "calibration" if part < 2 else "search" if part < 4 else "evaluation"


def hub_text(settings: HubText, *, sample: bool) -> Iterator[AnyDocument]:
    """Rows of any data set of the hub; for a sample from all over it, or from its files in random order.

    Raises:
        DataError: a row has no such column, or it holds no text.
    """
    seed = settings.seed if sample else None
    split = hub.Split(settings.id, settings.split, settings.name, None, settings.revision, settings.streaming, seed)
    for number, row in enumerate(hub.read_rows(split)):
        name = f"{settings.id}/{settings.split}:{number}"
        yield row_document(name, row, _column(settings), name)


def _joined(name: str, texts: Iterator[str], separator: str) -> Iterator[Document]:
    """One document out of many, made when it is first asked for."""
    yield Document(name, separator.join(texts))
