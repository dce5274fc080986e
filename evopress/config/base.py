"""What every section of the settings shares: strictness, near-name suggestions, safe names, and how it is printed."""

import difflib
import json
import os.path
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic_core import ErrorDetails

from evopress.util.errors import ConfigError

# Pydantic's reports on settings, in the words of those who write YAML.


def wording(problem: ErrorDetails) -> str:
    """What is wrong with one setting, without its path."""
    given, context = problem["input"], problem.get("ctx", {})
    match problem["type"]:
        case "union_tag_not_found":
            return f"the key {context['discriminator']} is missing: it says of which kind this section is"
        case "union_tag_invalid":
            return _unknown_kind(context)
        case "tuple_type" | "list_type":
            return f"must be a list, as in [{'...' if given is None else given}]"
        case "dict_type" | "model_type" | "model_attributes_type":
            if given is None:
                return "is empty: give it keys, or leave it out"
            return f"must be a section with keys of its own, not {given!r}"
        case "string_type" if isinstance(given, int | float):
            return f"must be text: put it in quotes, '{given}'"
        case "too_short":
            return "is empty: give at least one entry"
        case _:
            return problem["msg"].removeprefix("Value error, ")


def _unknown_kind(context: dict[str, Any]) -> str:
    """``context`` names the key that tells kinds apart, and those there are, each in quotes."""
    kinds = [kind.strip(" '") for kind in context["expected_tags"].split(",")]
    near = difflib.get_close_matches(str(context["tag"]).lower(), kinds, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(kinds)}"
    return f"unknown {str(context['discriminator']).strip(chr(39))} {context['tag']!r}: {hint}"


# What no text in the settings may hold: it goes into paths, command lines and files of JSON.

LONGEST = 4096
"""Characters; the longest path that Linux takes."""
DEEPEST = 32
_NO_CHARACTER = re.compile("[\0\ud800-\udfff]")
"""NUL ends a path or an argument; half a surrogate pair cannot be written as UTF-8."""


def unusable_texts(values: Any, path: str = "", depth: int = 0) -> Iterator[str]:
    """One line for each problem, starting with the dotted path of the setting."""
    where = path or "settings"
    if depth > DEEPEST:
        yield f"{where}: nested too deeply"
    elif isinstance(values, str):
        if len(values) > LONGEST:
            yield f"{where}: {len(values)} characters are more than a text may have ({LONGEST})"
        elif found := _NO_CHARACTER.search(values):
            yield f"{where}: {values[:80]!r} holds a character that no path or text can have ({found[0]!r})"
    elif isinstance(values, Mapping):
        for key, value in values.items():
            name = str(key)
            if problem := next(unusable_texts(name, where), None):
                yield problem
            else:
                yield from unusable_texts(value, f"{path}.{name}" if path else name, depth + 1)
    elif isinstance(values, list | tuple):
        for number, value in enumerate(values):
            yield from unusable_texts(value, f"{path}.{number}", depth + 1)


# Names of a run that become names of files: some file systems do not tell upper from lower case.


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


# Commands that messages advise: lines of a shell that work when pasted.


def snakemake_command(target: Path, configs: Sequence[Path]) -> str:
    """The line that makes one file with the settings of ``configs``, in the folder where this process runs."""
    laid_over = ["--configfile", *map(str, configs)] if configs else []
    return shlex.join([*_snakemake(), "--cores", "all", str(target), *laid_over])


def _snakemake() -> list[str]:
    """How to start the Snakemake of this Python; by name alone where that is the one that a shell finds."""
    beside = Path(sys.executable).with_name("snakemake")
    if not beside.exists():
        return [sys.executable, "-m", "snakemake"]
    found = shutil.which("snakemake")
    if found and beside.samefile(found):
        return ["snakemake"]
    return [str(beside.relative_to(Path.cwd())) if beside.is_relative_to(Path.cwd()) else str(beside)]


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
            known = [field.alias or name for name, field in cls.model_fields.items()]
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


_FORMS = ("number", "size")
"""Tags of the forms of `target` (`evopress.search.target`)."""


def _written_path(location: tuple[int | str, ...], values: Any) -> list[str]:
    """Leave out of a location what the user did not write: the kinds (as `gptq`) that pydantic puts between keys."""
    path = []
    for part in location:
        within = isinstance(values, dict) and part in values
        if isinstance(values, dict) and not within and part in [*values.values(), *_FORMS]:
            continue
        path.append(str(part))
        values = values[part] if within or (isinstance(values, list) and isinstance(part, int)) else None
    return path


class _Dumper(yaml.SafeDumper):
    """Safe YAML with lists on one line."""


_Dumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)


def to_yaml(values: dict[str, Any], *, sort: bool = False) -> str:
    """Text of ``values`` (plain JSON types), in their order or sorted."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=sort, allow_unicode=True, width=100)
