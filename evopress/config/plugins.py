"""Registries of plug-ins: kinds of one section of the settings, told apart by the value of a key.

A plug-in is a pydantic class whose fields are its settings, with a field such as ``method: Literal["gptq"]`` that names
it. To add one, write its class in a file of its own and name it in the registry of its kind.
"""

import difflib
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from pydantic.json_schema import models_json_schema

from evopress.config.base import Section, parse_section
from evopress.util.errors import ConfigError

P = TypeVar("P", bound=Section)


class Registry(Generic[P]):
    """The plug-ins of one kind."""

    def __init__(self, key: str, base: type[P], *plugins: type[P], default: type[P] | None = None) -> None:
        """Hold ``plugins``, of class ``base``.

        Args:
            key: the setting that names one of them, as in `method`.
            base: their class.
            plugins: all of them.
            default: the one that is meant where a section names none; None if it has to.
        """
        self.key, self.base, self.plugins, self.default = key, base, list(plugins), default

    def register(self, plugin: type[P]) -> type[P]:
        """Add a plug-in from outside of the package; may be used as a decorator."""
        self.plugins.append(plugin)
        return plugin

    def name_of(self, plugin: type[P]) -> str:
        """What the settings call a plug-in."""
        return str(plugin.model_fields[self.key].default)

    @property
    def names(self) -> list[str]:
        """What the settings call the plug-ins."""
        return [self.name_of(plugin) for plugin in self.plugins]

    def parse(self, values: Any, where: str) -> P:
        """The plug-in that a section names, with its settings.

        Args:
            values: the section, as YAML or JSON gives it.
            where: its dotted path, for messages.

        Raises:
            ConfigError: one line per problem, each starting with the dotted path of the setting.
        """
        if not isinstance(values, Mapping):
            what = "is empty: give it keys, or leave it out" if values is None else None
            raise ConfigError(f"{where}: {what or f'must be a section with keys of its own, not {values!r}'}")
        if self.key not in values and self.default is not None:
            return parse_section(self.default, values, where)
        if self.key not in values:
            raise ConfigError(f"{where}: the key {self.key!r} is missing: it says of which kind this section is")
        name = values[self.key]
        for plugin in self.plugins:
            if self.name_of(plugin) == name:
                return parse_section(plugin, values, where)
        near = difflib.get_close_matches(str(name).lower(), self.names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(self.names)}"
        raise ConfigError(f"{where}: unknown {self.key} {name!r}: {hint}")

    def schema(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """JSON schema of a section of this kind, and the definitions that it refers to."""
        references, whole = models_json_schema([(plugin, "validation") for plugin in self.plugins])
        kinds = [references[plugin, "validation"] for plugin in self.plugins]
        for plugin in self.plugins:
            if plugin is not self.default:
                section = whole["$defs"][plugin.__name__]
                section["required"] = [self.key, *section.get("required", [])]
        mapping = {name: kind["$ref"] for name, kind in zip(self.names, kinds, strict=True)}
        return {"oneOf": kinds, "discriminator": {"propertyName": self.key, "mapping": mapping}}, whole["$defs"]
