"""Searches that are run several times: `seeds: [0, 1]` of a search stands for `<name>-seed0` and `<name>-seed1`."""

from collections.abc import Mapping

from evopress.config.base import safe_name
from evopress.search.settings import SearchSettings


def repeated(searches: Mapping[str, SearchSettings]) -> dict[str, SearchSettings]:
    """Put one search for each of its seeds in the place of every search that has `seeds`.

    Raises:
        ValueError: a name that this gives is taken by another search, or too long.
    """
    expanded: dict[str, SearchSettings] = {}
    for name, search in searches.items():
        for seed in _seeds(search):
            repetition = safe_name(f"{name}-seed{seed}")
            if repetition in searches:
                raise ValueError(f"seeds of {name!r} make a search {repetition!r}, which is there already; rename one")
            expanded[repetition] = search.model_copy(update={"seed": seed})
        if not _seeds(search):
            expanded[name] = search
    return expanded


def written_name(name: str, search: SearchSettings) -> str:
    """Name that the settings file gives a search: for a repetition, that of the search with `seeds`."""
    return name.removesuffix(f"-seed{getattr(search, 'seed', '')}") if _seeds(search) else name


def groups(searches: Mapping[str, SearchSettings]) -> dict[str, list[str]]:
    """Searches by the name that the settings file gives them: repetitions together, the others alone."""
    found: dict[str, list[str]] = {}
    for name, search in searches.items():
        found.setdefault(written_name(name, search), []).append(name)
    return found


def _seeds(search: SearchSettings) -> tuple[int, ...]:
    return getattr(search, "seeds", None) or ()
