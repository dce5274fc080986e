"""What every section of the settings shares: strictness, near-name suggestions and safe names."""

import difflib
import json
import os.path
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

from evopress.config.wording import wording
from evopress.util.errors import ConfigError

_SAFE = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def safe_name(name: str) -> str:
    """Accept names that are safe as one component of a path and as a word of a shell line."""
    if not name or len(name) > 64 or not name[0].isalnum() or not set(name) <= _SAFE:
        raise ValueError(
            f"{name!r} cannot name a file: use up to 64 letters, digits, '.', '_' and '-', the first a letter or digit"
        )
    return name


Name = Annotated[str, AfterValidator(safe_name)]
UserPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path of the user's own; `~` is the home folder, as in a shell."""


class Section(BaseModel):
    """A section of the settings: frozen, and an unknown key is an error that offers the nearest known one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _suggest_near_names(cls, values: Any) -> Any:
        if isinstance(values, dict):
            known = list(cls.model_fields)
            for key in values:
                if key not in known:
                    near = difflib.get_close_matches(str(key), known, n=1)
                    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
                    raise ValueError(f"unknown key {str(key)!r}: {hint}")
        return values


def drop_removed(entries: Any) -> Any:
    """Leave out entries that are null, so that an overlay can remove what the default names."""
    if isinstance(entries, Mapping):
        return {name: entry for name, entry in entries.items() if entry is not None}
    return entries


S = TypeVar("S", bound=Section)


def parse_section(cls: type[S], values: Any, where: str = "") -> S:
    """Validate ``values`` as a section; ``where`` is the dotted path that error messages start with.

    Raises:
        ConfigError: one line per problem, each starting with the dotted path of the setting.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise ConfigError(describe(error, where, values)) from None


def parse_json(kind: Any, text: str, where: str = "") -> Any:
    """Validate the JSON that a rule passes to its script, as a section or a union of sections.

    Raises:
        ConfigError: as ``parse_section``.
    """
    if hasattr(kind, "parse"):  # a registry of plug-ins
        return kind.parse(json.loads(text), where)
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        raise ConfigError(describe(error, where)) from None


def describe(error: ValidationError, where: str = "", values: Any = None) -> str:
    """Turn pydantic's report on ``values`` into lines of ``dotted.path: what is wrong``."""
    lines = []
    for problem in error.errors():
        path = ".".join(part for part in [where, *_written_path(problem["loc"], values)] if part)
        lines.append(f"{path or 'settings'}: {wording(problem)}")
    return "\n".join(lines)


def _written_path(location: tuple[int | str, ...], values: Any) -> list[str]:
    """Leave out of a location what the user did not write: the kinds (as `gptq`) that pydantic puts between keys."""
    path = []
    for part in location:
        within = isinstance(values, dict) and part in values
        if isinstance(values, dict) and not within and part in list(values.values()):
            continue
        path.append(str(part))
        values = values[part] if within or (isinstance(values, list) and isinstance(part, int)) else None
    return path
