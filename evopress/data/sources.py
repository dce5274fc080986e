"""From settings and role to documents: what each named source means.

The conventions of wikitext2 and C4 are those of the field's tables, as in the code of GPTQ (arXiv 2210.17323) and
SparseGPT (arXiv 2301.00774): one joined text, cut into windows.

The help topics that ship with CPython are text that is there without a network. They quote one another (``compound``
contains ``if``, ``for``, ``with``...), so splitting by topic alone would put the same paragraphs into calibration and
evaluation. Topics that share a paragraph therefore form a family, and a family goes to one role as a whole. A topic
that only repeats larger ones of its family is left out.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice

import numpy as np

from evopress.config.data import C4, FileText, FineWebEdu, HubText, PythonDocs, Role, TextSettings, WikiText2
from evopress.data import hub
from evopress.data.documents import AnyDocument, Column, Corpus, Document, named_files, read_files, row_document
from evopress.data.sampling import PASSAGE, SMALL, is_small, sampled, text_bytes
from evopress.util.errors import DataError

C4_DOCUMENTS = 1100
C4_WINDOWS = 256
"""What the field's tables take of C4's first validation shard."""
SHARES: dict[Role, float] = {"calibration": 0.4, "search": 0.3, "evaluation": 0.3}
"""Part of the help topics, by length, that each role gets."""
_PARAGRAPH = 100
"""Characters from which a paragraph that occurs twice counts as quoted; shorter ones are headings and phrases."""


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


def python_docs(role: Role) -> list[Document]:
    """Topics of one role, sorted by name. The split depends on the topics alone: on no seed, no size.

    Raises:
        DataError: this Python comes without its help topics.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(
            "python_docs: this Python lacks pydoc_data.topics; install its whole standard library or use source: file"
        ) from None
    return [Document(f"python_docs/{name}", topics[name]) for name in split_topics(topics)[role]]


def split_topics(topics: Mapping[str, str]) -> dict[Role, list[str]]:
    """Names of the topics of each role: largest family first, to the role that lacks most of its share."""
    kept = [distinct(family, topics) for family in families(topics)]
    size = {tuple(names): sum(len(topics[name]) for name in names) for names in kept}
    missing = {role: share * sum(size.values()) for role, share in SHARES.items()}
    roles: dict[Role, list[str]] = {role: [] for role in SHARES}
    for names in sorted(size, key=lambda names: (-size[names], names)):
        role = max(missing, key=lambda role: missing[role])
        roles[role] += names
        missing[role] -= size[names]
    return {role: sorted(names) for role, names in roles.items()}


def paragraphs(text: str) -> set[str]:
    """Long paragraphs of a text, with spaces folded so that indentation does not hide a quotation."""
    folded = (re.sub(r"\s+", " ", part).strip() for part in re.split(r"\n\s*\n", text))
    return {part for part in folded if len(part) >= _PARAGRAPH}


def families(topics: Mapping[str, str]) -> list[list[str]]:
    """Groups of topics connected by shared paragraphs; every topic is in exactly one group."""
    found: list[tuple[set[str], set[str]]] = []  # names, paragraphs
    for name in sorted(topics):
        names, quoted, apart = {name}, paragraphs(topics[name]), []
        for other in found:
            if other[1].isdisjoint(quoted):
                apart.append(other)
            else:
                names, quoted = names | other[0], quoted | other[1]
        found = [*apart, (names, quoted)]
    return [sorted(names) for names, _ in found]


def distinct(family: list[str], topics: Mapping[str, str]) -> list[str]:
    """Members of a family without those whose paragraphs all stand in larger members."""
    kept: list[str] = []
    seen: set[str] = set()
    for name in sorted(family, key=lambda name: (-len(topics[name]), name)):
        own = paragraphs(topics[name])
        if not kept or not own <= seen:
            kept.append(name)
            seen |= own
    return sorted(kept)
