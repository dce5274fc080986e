"""The help topics that ship with CPython: text that is there without a network.

Topics quote one another (``compound`` contains ``if``, ``for``, ``with``...), so splitting by topic alone would put
the same paragraphs into calibration and evaluation. Topics that share a paragraph therefore form a family, and a
family goes to one role as a whole. A topic that only repeats larger ones of its family is left out.
"""

import re
from collections.abc import Mapping

from evopress.config.data import Role
from evopress.data.documents import Document
from evopress.util.errors import DataError

SHARES: dict[Role, float] = {"calibration": 0.4, "search": 0.3, "evaluation": 0.3}
"""Part of the text, by length, that each role gets."""
_PARAGRAPH = 100
"""Characters from which a paragraph that occurs twice counts as quoted; shorter ones are headings and phrases."""


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
