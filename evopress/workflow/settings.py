"""All settings of a run: read from files that are laid over the default, and what must hold between their sections."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import AfterValidator, Field, SerializeAsAny
from yaml.nodes import MappingNode, ScalarNode

from evopress.artifacts.paths import DENSE, GGUF
from evopress.compression.base import Method
from evopress.compression.methods import METHODS
from evopress.config.base import Name, Section, drop_removed, equal_names, parse_section, unusable_texts
from evopress.config.context import ComputeSettings
from evopress.config.data import DataSettings, HessianSettings, TextSettings
from evopress.config.evaluation import CardSettings, EvaluationSettings
from evopress.config.model import ModelSettings
from evopress.config.plugins import Registry
from evopress.export.base import Exporter
from evopress.export.exporters import EXPORTERS
from evopress.search.base import Strategy
from evopress.search.evaluating import SelectingStrategy
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

DEFAULT = Path("config/config.yaml")
"""What settings in files are laid over."""
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
    card: CardSettings = CardSettings()
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
        settings = parse_section(cls, _without_removed_texts(parsed))._resolved()
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

    def _resolved(self) -> Self:
        """With the searches that the strategies stand for; those of unknown variants stay as they are.

        One over several variants is that of the first which has levels of layers.
        """
        searches = dict(self.searches)
        for name, search in searches.items():
            methods = [self.variants[source] for source in search.sources if source in self.variants]
            for method in sorted(methods, key=lambda each: each.family.takes_modules)[:1]:
                searches[name] = search.resolved(method, self.data.search)
        return self.model_copy(update={"searches": searches})

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
            yield from _token_problems(where, search, self.data.search)
            yield from export_problems(f"{where}.exports", search, self.variants)
        if self.evaluation.runtime and not any(GGUF in _named(search.exports) for search in self.searches.values()):
            yield (
                "evaluation.runtime: no search exports a GGUF file, which the runtime could run; add `exports: [gguf]` "
                "to a search, or leave `evaluation.runtime` out"
            )

    def exports_of(self, search: str) -> list[Exporter]:
        """Exporters of a search, with their settings."""
        return exporters_of(self.searches[search], f"searches.{search}.exports")

    def on_tasks(self) -> list[str]:
        """Models that answer lm-eval's tasks: all, or none where no task is named."""
        return [DENSE, *self.searches] if self.evaluation.tasks.names else []

    def in_runtime(self) -> list[str]:
        """Models whose files are measured in the runtime: the dense one, and that of every search with a GGUF file."""
        if self.evaluation.runtime is None:
            return []
        return [DENSE, *(name for name, search in self.searches.items() if GGUF in _named(search.exports))]

    def fronts(self) -> list[str]:
        """Names, in the settings file, of searches that stand for several sizes each."""
        sized = [written_name(name, search) for name, search in self.searches.items() if search.sizes_wanted()]
        return list(dict.fromkeys(sized))

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


def _token_problems(where: str, search: Strategy, text: TextSettings) -> Iterator[str]:
    available = text.tokens
    sequences = None if available is None else available // text.sequence_length
    if isinstance(search, SelectingStrategy) and search.confidence and sequences == 1:
        yield (
            f"{where}.confidence: differences are compared between sequences, and the search text has one: set "
            f"data.search.tokens to more than its sequence_length ({text.sequence_length}), or confidence to 0"
        )
    for key, asked in search.tokens_asked().items():
        if available is not None and asked > available:
            yield f"{where}.{key}: {asked} tokens are more than data.search.tokens has ({available})"


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key that is given twice is an error: all but the last would be lost without a word."""

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        """Look at what is written, before `<<` merges in what may well be overridden."""
        node = super().compose_mapping_node(anchor)
        written: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, ScalarNode) and key.value in written:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: {key.value!r} is given twice; keep one of them")
            written.add(str(key.value))
        return node


def load_settings(paths: Sequence[Path]) -> Settings:
    """Settings of files that are laid over the default.

    Raises:
        ConfigError: a file is missing or no YAML, or the settings are wrong.
    """
    return Settings.load(combined(map(read_yaml, paths)))


def combined(overlays: Iterable[Mapping[str, Any]], default: Path = DEFAULT) -> dict[str, Any]:
    """Lay overlays over one another, and over the ``default`` unless they say that they are complete.

    Raises:
        ConfigError: the default is missing.
    """
    values: dict[str, Any] = {}
    for overlay in overlays:
        values = lay_over(values, overlay)
    return values if values.get("complete") else lay_over(read_yaml(default), values)


def read_yaml(path: Path) -> dict[str, Any]:
    """Settings in a file.

    Raises:
        ConfigError: it is missing, or no mapping in YAML.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 (a SafeLoader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: missing; check the path, or start in the project's folder") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds no settings (a mapping in YAML)")
    return values
