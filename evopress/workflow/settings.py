"""All settings of a run, and what must hold between their sections."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, SerializeAsAny

from evopress.artifacts.paths import DENSE, GGUF
from evopress.compression.base import Method
from evopress.compression.methods import METHODS
from evopress.config.base import Name, Section, drop_removed, parse_section
from evopress.config.compute import ComputeSettings
from evopress.config.data import DataSettings
from evopress.config.evaluation import EvaluationSettings
from evopress.config.hessians import HessianSettings
from evopress.config.model import ModelSettings
from evopress.config.names import equal_names
from evopress.config.plugins import Registry
from evopress.config.texts import unusable_texts
from evopress.export.base import Exporter
from evopress.export.exporters import EXPORTERS
from evopress.search.base import Strategy
from evopress.search.strategies import STRATEGIES
from evopress.util.errors import ConfigError
from evopress.workflow.searches import (
    dependency_problems,
    export_problems,
    exporters_of,
    offer_problems,
    polish_problems,
    repeated,
    strategy_problems,
    with_exports,
    written_name,
)

ROLES = ("calibration", "search")
"""Names of token files that no evaluation set may take."""
KINDS = ("source", "method", "strategy", "exporter")
"""Keys that say of which kind a section is, and so which other keys it may hold."""
SIZES = ("bytes", "fraction", "bpw")
"""Forms of a target that is the size of a file; a section has one of them."""


class Settings(Section):
    """Everything that a run is asked to do."""

    name: Name = Field(description="Folder under `results/` that the run writes to.")
    complete: bool = Field(
        False, description="True in a file that stands alone instead of being laid over config/config.yaml."
    )
    model: ModelSettings
    data: DataSettings
    hessians: HessianSettings = HessianSettings()
    variants: dict[Name, SerializeAsAny[Method]] = Field(
        {}, description="Databases of compressed layers, by name; null removes an entry."
    )
    searches: Annotated[dict[Name, SerializeAsAny[Strategy]], AfterValidator(repeated)] = Field(
        {}, description="Ways to choose levels, by name; null removes an entry."
    )
    evaluation: EvaluationSettings = EvaluationSettings()
    studies: Any = Field({}, description="Experiments on the method, for workflow/studies: its own code checks them.")
    compute: ComputeSettings = ComputeSettings()

    @classmethod
    def load(cls, values: Mapping[str, Any]) -> Self:
        """Validate settings, section by section and then against one another.

        Raises:
            ConfigError: one line per problem, each starting with the dotted path of the setting.
        """
        if unusable := list(unusable_texts(values)):
            raise ConfigError("\n".join(unusable))
        parsed, wrong = dict(values), []
        for section, registry in PLUGINS.items():
            parsed[section], found = _parsed(values.get(section, {}), section, registry)
            wrong += found
        if wrong:
            raise ConfigError("\n".join(wrong))
        settings = parse_section(cls, _without_removed_texts(parsed))
        if problems := dict.fromkeys(settings.problems()):  # repetitions of a search share theirs
            raise ConfigError("\n".join(problems))
        searches = {
            name: with_exports(search, settings.variants, f"searches.{written_name(name, search)}")
            for name, search in settings.searches.items()
        }
        if problems := dict.fromkeys(
            problem
            for name, search in searches.items()
            for problem in offer_problems(f"searches.{written_name(name, search)}", search, settings.variants)
        ):
            raise ConfigError("\n".join(problems))
        return settings.model_copy(update={"searches": searches})

    def problems(self) -> Iterator[str]:
        """What does not hold between sections, one line each, starting with the dotted path of the setting."""
        yield from equal_names(
            {
                "data.evaluation": [*ROLES, *self.data.evaluation],
                "variants": self.variants,
                "searches": [DENSE, *self.searches],
            }
        )
        for name in self.data.evaluation:
            if name in ROLES:
                yield f"data.evaluation.{name}: the name is taken by data.{name}; choose another"
        for repetition, search in self.searches.items():
            name = written_name(repetition, search)
            where = f"searches.{name}"
            if name == DENSE:
                yield f"{where}: the name is taken by the uncompressed model; choose another"
            yield from strategy_problems(where, search, self.variants)
            yield from polish_problems(where, search, self.variants)
            yield from dependency_problems(where, repetition, self.searches, self.variants)
            yield from _token_problems(where, search, self.data.search.tokens)
            yield from export_problems(f"{where}.exports", search, self.variants)
        if self.evaluation.runtime and not any(GGUF in _named(search.exports) for search in self.searches.values()):
            yield (
                "evaluation.runtime: no search exports a GGUF file, which the runtime could run; add `exports: [gguf]` "
                "to a search, or leave `evaluation.runtime` out"
            )

    def exports_of(self, search: str) -> list[Exporter]:
        """Exporters of a search, with their settings."""
        return exporters_of(self.searches[search], f"searches.{search}.exports")

    def in_runtime(self) -> list[str]:
        """Models whose files are measured in the runtime: the dense one, and that of every search with a GGUF file."""
        if self.evaluation.runtime is None:
            return []
        return [DENSE, *(name for name, search in self.searches.items() if GGUF in _named(search.exports))]

    def exporter_of(self, search: str, name: str) -> Exporter:
        """The exporter of this name as a search asks for it, or, if it does not, with the defaults."""
        asked = {exporter.exporter: exporter for exporter in self.exports_of(search)}
        return asked.get(name) or EXPORTERS.parse({EXPORTERS.key: name}, "exports")


PLUGINS: dict[str, Registry[Any]] = {"variants": METHODS, "searches": STRATEGIES}
"""Registries by the section of the settings that holds plug-ins, by name."""


def _parsed(entries: Any, section: str, registry: Registry[Any]) -> tuple[Any, list[str]]:
    """Plug-ins of a section of the settings by name, without those that are null, and what is wrong with the others."""
    if not isinstance(entries, Mapping):
        return entries, []  # which is for pydantic to refuse
    parsed, wrong = {}, []
    for name, values in drop_removed(entries).items():
        try:
            parsed[name] = values if isinstance(values, Section) else registry.parse(values, f"{section}.{name}")
        except ConfigError as error:
            wrong.append(str(error))
    return parsed, wrong


def lay_over(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """Merge ``overlay`` into ``base``, key by key and at every depth.

    A section whose kind changes (another ``source``, ``method`` or ``strategy``) is replaced whole: the keys of the
    old kind mean nothing to the new one. So is a target in `bytes` by one that is a `fraction`, or in `bpw`.
    """
    merged = dict(base)
    for key, value in overlay.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping) and not _changes_kind(below, value):
            merged[key] = lay_over(below, value)
        else:
            merged[key] = value
    return merged


def _changes_kind(below: Mapping[str, Any], above: Mapping[str, Any]) -> bool:
    if any(kind in above and kind in below and above[kind] != below[kind] for kind in KINDS):
        return True
    return any(form in above and form not in below for form in SIZES) and any(form in below for form in SIZES)


def _without_removed_texts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Drop evaluation sets that are null (done here because `data` is a section of its own)."""
    data = values.get("data")
    if not isinstance(data, Mapping) or "evaluation" not in data:
        return dict(values)
    return {**values, "data": {**data, "evaluation": drop_removed(data["evaluation"])}}


def _named(exports: Iterable[Any]) -> list[Any]:
    """Names of the exporters that a search asks for, by name alone or with settings."""
    return [one.get(EXPORTERS.key) if isinstance(one, Mapping) else one for one in exports]


def _token_problems(where: str, search: Strategy, available: int | None) -> Iterator[str]:
    for key, asked in search.tokens_asked().items():
        if available is not None and asked > available:
            yield f"{where}.{key}: {asked} tokens are more than data.search.tokens has ({available})"
