"""Searches that rest on other searches: which must be there, of the same family, and without a circle."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from graphlib import CycleError, TopologicalSorter

from evopress.compression.base import Method
from evopress.search.settings import SearchSettings
from evopress.workflow.seeds import groups


def order_problems(
    where: str, name: str, searches: Mapping[str, SearchSettings], variants: Mapping[str, Method]
) -> Iterator[str]:
    """Why a search cannot start from the others that it names.

    Args:
        where: dotted path of its settings.
        name: of the search.
        searches: all there are, by name.
        variants: all there are, by name.
    """
    circle = _circle(searches)
    for other in searches[name].rests_on():
        if other not in searches and (repetitions := groups(searches).get(other)):
            yield f"{where}.start_from: {other!r} is run with several seeds; name one of {', '.join(repetitions)}"
        elif other not in searches:
            near = get_close_matches(other, searches, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(searches)}"
            yield f"{where}.start_from: no search is named {other!r}: {hint}"
        elif {name, other} <= circle:
            yield f"{where}.start_from: {other!r} rests on this search itself; name another"
        elif _family(searches[name], variants) != _family(searches[other], variants):
            yield (
                f"{where}.start_from: {other!r} chooses from variants of another family "
                f"({searches[other].variants!r}); name one that quantizes, prunes or drops as this one does"
            )


def _circle(searches: Mapping[str, SearchSettings]) -> set[str]:
    """Searches that rest on one another in a circle; of several circles the first."""
    graph = {name: set(search.rests_on()) & set(searches) for name, search in searches.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return set(error.args[1])
    return set()


def _family(search: SearchSettings, variants: Mapping[str, Method]) -> str:
    made = variants.get(search.variants)
    if made is None:
        return "unknown"  # which is an error of its own
    return made.family.name
