"""What must hold between searches, and between them and their variants.

A search may be run several times: `seeds: [0, 1]` stands for `<name>-seed0` and `<name>-seed1`, and the `sizes` of a
front for `<name>-65mb` and so on. It may depend on other
searches, which must be there, of the same family, and without a circle.
"""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from evopress.artifacts.paths import HUGGINGFACE
from evopress.compression.base import Method
from evopress.config.base import safe_name
from evopress.export.base import Exporter
from evopress.export.exporters import EXPORTERS
from evopress.search.base import Strategy
from evopress.search.offered import merged
from evopress.search.target import SizeTarget, size_name
from evopress.util.errors import ConfigError


def repeated(searches: Mapping[str, Strategy]) -> dict[str, Strategy]:
    """Put one search for each size and each seed in the place of every search that has `sizes` or `seeds`.

    Raises:
        ValueError: a name that this gives is taken by another search, or too long.
    """
    expanded: dict[str, Strategy] = {}
    for name, search in searches.items():
        for part, one in _parts(name, search):
            if part != name and part in {*searches, *expanded}:
                what = "sizes" if search.sizes_wanted() else "seeds"
                raise ValueError(f"{what} of {name!r} make a search {part!r}, which is there already; rename one")
            expanded[safe_name(part)] = one
    return expanded


def _parts(name: str, search: Strategy) -> Iterator[tuple[str, Strategy]]:
    """Searches that one stands for, by name: of each size, with each seed; or itself."""
    sized = [(name, search)]
    if sizes := search.sizes_wanted():
        sized = [
            (f"{name}-{size_name(size)}", search.model_copy(update={"target": SizeTarget(bytes=size)}))
            for size in sizes
        ]
    for part, one in sized:
        for seed in _seeds(search):
            yield f"{part}-seed{seed}", one.model_copy(update={"seed": seed})
        if not _seeds(search):
            yield part, one


def with_file(search: Strategy, where: str) -> Strategy:
    """The same search, whose target knows the file that it is the size of; ``where`` is the path of `target.file`.

    Raises:
        ConfigError: there is no such export.
    """
    target = search.target
    if not isinstance(target, SizeTarget) or isinstance(target.file, Exporter):
        return search
    if isinstance(target.file, Mapping):
        exporter = EXPORTERS.parse(target.file, where)
    else:
        asked = {one.exporter: one for one in exporters_of(search, where.replace("target.file", "exports"))}
        sized = [one for one in asked.values() if one.has_size]
        if target.file is None and not sized:
            return search
        if target.file is not None and target.file not in asked:
            raise ConfigError(f"{where}: {target.file!r} is none of the exports of this search; add it to them")
        exporter = sized[0] if target.file is None else asked[target.file]
    if not exporter.has_size:
        raise ConfigError(f"{where}: {exporter.exporter} is the same size whatever the levels; name another export")
    return search.model_copy(update={"target": target.model_copy(update={"file": exporter})})


def written_name(name: str, search: Strategy) -> str:
    """Name that the settings file gives a search: for one of several, that of the search with `seeds` or `sizes`."""
    name, target = _without_seed(name, search), search.target
    if search.sizes_wanted() and isinstance(target, SizeTarget) and target.bytes is not None:
        return name.removesuffix(f"-{size_name(target.bytes)}")
    return name


def groups(searches: Mapping[str, Strategy]) -> dict[str, list[str]]:
    """Searches by their name without the seed: repetitions together, the others alone."""
    found: dict[str, list[str]] = {}
    for name, search in searches.items():
        found.setdefault(_without_seed(name, search), []).append(name)
    return found


def _without_seed(name: str, search: Strategy) -> str:
    return name.removesuffix(f"-seed{getattr(search, 'seed', '')}") if _seeds(search) else name


def _seeds(search: Strategy) -> tuple[int, ...]:
    return getattr(search, "seeds", None) or ()


def variants_problems(
    where: str, name: str, target: float | SizeTarget, variants: Mapping[str, Method]
) -> Iterator[str]:
    """Why variants cannot be picked from, whatever does it.

    Args:
        where: dotted path of the settings that name them.
        name: of the variants.
        target: of the choice.
        variants: all there are, by name.
    """
    if name in variants:
        if not isinstance(target, SizeTarget):  # of which only the whole model tells
            yield from variants[name].target_problems(target, where)
        return
    near = get_close_matches(name, variants, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(variants) or 'none'}"
    yield f"{where}.variants: no variants are named {name!r}: {hint}"


def strategy_problems(where: str, search: Strategy, variants: Mapping[str, Method]) -> Iterator[str]:
    """Why a search cannot pick from its variants; a strategy that is not for them says so instead of the target."""
    for source in search.sources:
        made = variants.get(source)
        own = list(search.of(source).problems(where, made)) if made is not None else []
        yield from own or variants_problems(where, source, search.target, variants)
    if all(source in variants for source in search.sources):
        methods = {source: variants[source] for source in search.sources}
        yield from (
            _joint_problems(where, search, methods) if len(methods) > 1 else _size_problems(where, search, methods)
        )


def _size_problems(where: str, search: Strategy, methods: Mapping[str, Method]) -> Iterator[str]:
    """Why a search over one of the variants cannot have the size of a file as its target."""
    if isinstance(search.target, SizeTarget) and methods[search.sources[0]].family.takes_modules:
        yield (
            f"{where}.target: a search over dropped modules has no size of a file as its target; say how many "
            "blocks are to go, or name variants of layers as well"
        )
    else:
        yield from _work_problems(where, search)


def _work_problems(where: str, search: Strategy) -> Iterator[str]:
    """Why a search in which all modules stay cannot have a bound on multiply-adds."""
    if isinstance(search.target, SizeTarget) and search.target.multiply_adds is not None:
        yield (
            f"{where}.target.multiply_adds: only dropped modules save multiply-adds; name variants of `method: drop` "
            "as well, or remove it"
        )


def _joint_problems(where: str, search: Strategy, methods: Mapping[str, Method]) -> Iterator[str]:
    """Why a search cannot pick from several variants at once."""
    modules = [source for source, method in methods.items() if method.family.takes_modules]
    if not search.joint:
        yield (
            f"{where}.variants: {search.strategy} chooses from one of the variants; name one, or use the strategy "
            "`auto`, `evolution`, `front` or `dp`"
        )
    if not isinstance(search.target, SizeTarget):
        yield (
            f"{where}.target: levels of several variants have bytes in common and nothing else; give the size of a "
            "file, as in `{bytes: 95 MB}`"
        )
    elif modules and search.target.file is not None:
        yield (
            f"{where}.target.file: how large a file without some of its modules is depends on which of them go, so no "
            "export can tell it; leave it out, and the packed size of the whole model counts"
        )
    if not modules:
        yield from _work_problems(where, search)
    if getattr(search, "step_tokens", 0):
        yield f"{where}.step_tokens: is for one of the variants; remove it, or name one"
    if len(modules) > 1:
        yield f"{where}.variants: {' and '.join(modules)} both drop modules; name one of them"
    if len(modules) == len(methods):
        yield f"{where}.variants: none of {', '.join(methods)} has levels of linear layers; name one that has"
    if modules and search.grouping() != "none":
        yield (
            f"{where}.group_rule: what a dropped module leaves is for all layers to spend; leave it out, or take "
            f"{modules[0]!r} out of the variants"
        )
    if search.levels is not None:
        yield f"{where}.levels: is for one of the variants; name the levels in the settings of each of them"


def polish_problems(where: str, search: Strategy, variants: Mapping[str, Method]) -> Iterator[str]:
    """Why what a search finds cannot be polished."""
    made = variants.get(search.sources[0])
    if search.polishes and len(search.sources) > 1:
        yield f"{where}.polish: makes levels of one of the variants anew, and this search has several; remove it"
    elif search.polishes and made is not None and made.family.takes_modules:
        yield (
            f"{where}.polish: makes levels of linear layers anew, but {search.variants!r} drops modules and leaves the "
            "rest as it is; remove it"
        )


def dependency_problems(
    where: str, name: str, searches: Mapping[str, Strategy], variants: Mapping[str, Method]
) -> Iterator[str]:
    """Why a search cannot depend on the others that it names.

    Args:
        where: dotted path of its settings.
        name: of the search.
        searches: all there are, by name.
        variants: all there are, by name.
    """
    at = f"{where}.{searches[name].earlier}"
    for other in searches[name].depends_on():
        if other not in searches and (
            parts := [one for one, made in searches.items() if written_name(one, made) == other]
        ):
            yield f"{at}: {other!r} stands for several searches; name one of {', '.join(parts)}"
        elif other not in searches:
            near = get_close_matches(other, searches, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(searches)}"
            yield f"{at}: no search is named {other!r}: {hint}"
        elif _reaches(other, name, searches):
            yield f"{at}: {other!r} depends on this search itself; name another"
        elif not _families(searches[other], variants) <= _families(searches[name], variants):
            yield (
                f"{at}: {other!r} chooses from variants of another family "
                f"({searches[other].variants!r}); name one that quantizes, prunes or drops as this one does"
            )


def exporters_of(search: Strategy, where: str) -> list[Exporter]:
    """Exporters that a search names, with their settings; the one whose folder is evaluated first.

    Args:
        search: what it asks for.
        where: dotted path of its `exports`.

    Raises:
        ConfigError: there is no such exporter, its settings are wrong, or it is named twice.
    """
    found: dict[str, Exporter] = {}
    for one in search.exports:
        exporter = EXPORTERS.parse({EXPORTERS.key: one} if isinstance(one, str) else one, where)
        if exporter.exporter in found:
            raise ConfigError(f"{where}: {exporter.exporter} is named twice; keep one of them")
        found[exporter.exporter] = exporter
    evaluated = found.pop(HUGGINGFACE, None) or EXPORTERS.parse({EXPORTERS.key: HUGGINGFACE}, where)
    return [evaluated, *found.values()]


def export_problems(where: str, search: Strategy, variants: Mapping[str, Method]) -> Iterator[str]:
    """Why what a search finds cannot be written as it asks; ``where`` is the dotted path of its `exports`."""
    try:
        exporters = exporters_of(search, where)
    except ConfigError as error:
        yield str(error)
        return
    known = {source: variants[source] for source in search.sources if source in variants}
    drops = any(method.family.takes_modules for method in known.values())
    for exporter in exporters:
        if exporter.of_dropped and known and not drops:
            yield (
                f"{where}: {exporter.exporter} is for models that lost modules, and "
                f"{' and '.join(map(repr, known))} {'drops' if len(known) == 1 else 'drop'} none; leave it out"
            )
        for source, method in known.items():
            yield from exporter.problems(where, method, search.of(source))


def with_exports(search: Strategy, variants: Mapping[str, Method], where: str) -> Strategy:
    """The search with what its exports ask of it: layers that share a level, and levels that they can write.

    A target that is the size of a file gets the exporter that writes it. Where modules are dropped, it is the packed
    size of the model: what stands in a file in their place depends on which of them go.

    Args:
        search: as the settings have it.
        variants: all there are, by name.
        where: dotted path of its settings.

    Raises:
        ConfigError: an exporter is unknown, or its settings are wrong.
    """
    methods = [variants[source] for source in search.sources if source in variants]
    if not any(method.family.takes_modules for method in methods):
        search = with_file(search, f"{where}.target.file")
    layered = [method for method in methods if not method.family.takes_modules]
    if not layered:
        return search
    exporters = exporters_of(search, f"{where}.exports")
    ties = [tie for exporter in exporters for tie in exporter.ties()]
    method, joint = layered[0], len(search.sources) > 1  # exporters that take some levels only refuse several variants
    allowed = [labels for one in exporters if not joint and (labels := one.levels(method)) is not None]
    asked: dict[str, Any] = {}
    if ties:
        asked["tied"] = merged((*search.tied, *ties))
    if allowed:
        known = method.labels() if search.levels is None else search.levels
        asked["levels"] = tuple(label for label in known if all(label in labels for labels in allowed))
    return search.model_copy(update=asked) if asked else search


def offer_problems(where: str, search: Strategy, variants: Mapping[str, Method]) -> Iterator[str]:
    """Why a search cannot do with the levels that it, or its exports, restrict it to.

    Args:
        where: dotted path of its settings.
        search: with what its exports ask (`with_exports`).
        variants: all there are, by name.
    """
    if len(search.sources) > 1:
        return  # levels are those of the variants
    method = variants[search.sources[0]]
    if method.family.takes_modules:
        for key in ("tied", "levels"):
            if getattr(search, key):
                yield f"{where}.{key}: is for linear layers, and {search.variants!r} drops modules; leave it out"
        return
    if search.levels is None:
        return
    made = method.labels()
    if unknown := [label for label in search.levels if label not in made]:
        yield f"{where}.levels: {search.variants!r} has no level {unknown[0]!r}; its levels are {', '.join(made)}"
    elif not search.levels:
        yield f"{where}.levels: none of {search.variants!r} is left that all exports can write; name fewer exports"
    else:
        left = {search.sources[0]: method.limited(search.levels)}
        for problem in strategy_problems(where, search, left):
            yield f"{problem} (`levels` and exports leave {', '.join(search.levels)} of {', '.join(made)})"


def _reaches(name: str, goal: str, searches: Mapping[str, Strategy]) -> bool:
    """Whether ``name`` is, or depends on, the search ``goal``; circles that leave it out end, too."""
    seen: set[str] = set()
    open_ends = [name]
    while open_ends:
        current = open_ends.pop()
        if current == goal:
            return True
        if current not in seen and current in searches:
            seen.add(current)
            open_ends += searches[current].depends_on()
    return False


def _families(search: Strategy, variants: Mapping[str, Method]) -> set[str]:
    """Of its variants; those that are not there are an error of their own."""
    return {variants[source].family.name for source in search.sources if source in variants}
