"""Names of a run that become names of files: some file systems do not tell upper from lower case."""

from collections.abc import Iterable, Iterator


def equal_names(sections: dict[str, Iterable[str]]) -> Iterator[str]:
    """Why names cannot stand side by side: they would share files where case is not told apart.

    Args:
        sections: names by the dotted path of the section that holds them.
    """
    for where, names in sections.items():
        seen: dict[str, str] = {}
        for name in names:
            other = seen.setdefault(name.casefold(), name)
            if other != name:
                yield (
                    f"{where}.{name}: differs from {other!r} in case alone, and many file systems would take their "
                    "files for the same; choose another name"
                )
