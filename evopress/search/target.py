"""Targets in bytes: what the file of the compressed model may hold, and the budgets that follow from it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, SerializeAsAny, Tag, WithJsonSchema, model_validator

from evopress.compression.base import Unit
from evopress.compression.families import share_out
from evopress.config.base import Section
from evopress.util.errors import ConfigError

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def _bytes(value: Any) -> Any:
    """Bytes of `95 MB` and the like; what is no such text is for pydantic to check."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*([\d_]*\.?\d+)\s*([a-zA-Z]+)\s*", value)
    if found is None or found[2].lower() not in _UNITS:
        raise ValueError(f"{value!r} is no size; write it as in `95 MB`, `1.5 GB`, `4 GiB`, or as a number of bytes")
    return round(float(found[1]) * _UNITS[found[2].lower()])


Bytes = Annotated[int, BeforeValidator(_bytes), Field(gt=0), WithJsonSchema({"type": ["integer", "string"]})]
"""A size that may be written as in `95 MB`."""


class SizeTarget(Section):
    """The size of the file that comes out: in bytes, as a fraction of the dense model, or in bits per parameter."""

    bytes: Bytes | None = Field(
        None, description="Most that the file may hold, as in `95 MB`, `4 GiB`, or as a number."
    )
    fraction: float | None = Field(
        None, gt=0, lt=1, description="The same as a fraction of the bytes of the dense model's weights."
    )
    bpw: float | None = Field(
        None, gt=0, lt=64, description="The same as bits of the file for each parameter of the model, all counted."
    )
    file: SerializeAsAny[Any] = Field(
        None,
        description="Which export is meant, where the search asks for several beside `huggingface`: its name, or the "
        "section of its settings. If it asks for none, the packed size of the whole model is.",
    )
    multiply_adds: float | None = Field(
        None,
        gt=0,
        lt=1,
        exclude_if=lambda share: share is None,
        description="A bound on the work as well: most multiply-adds for a token, as a fraction of those of the dense "
        "model's linear layers and head. Only dropped modules save any, so one of the variants has to drop modules.",
    )
    above_source: bool = Field(
        False,
        description="Allow a size that is not below that of the quantized file that the model comes from. Such a "
        "model is larger than what it was made of, and cannot be better.",
    )

    @model_validator(mode="after")
    def _check_one(self) -> "SizeTarget":
        given = [name for name in ("bytes", "fraction", "bpw") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of bytes, fraction and bpw; got {' and '.join(given) or 'none'}")
        return self

    def limit(self, dense: int, parameters: int) -> int:
        """Most bytes of the file.

        Args:
            dense: bytes of the dense model's weights.
            parameters: of the model.
        """
        if self.bytes is not None:
            return self.bytes
        return int(self.fraction * dense if self.fraction is not None else (self.bpw or 0) * parameters / 8)

    def __str__(self) -> str:
        if self.bytes is not None:
            size = megabytes(self.bytes)
        elif self.fraction is not None:
            size = f"{self.fraction:g} of the dense model"
        else:
            size = f"{self.bpw:g} bits a parameter"
        return size if self.multiply_adds is None else f"{size} and {self.multiply_adds:g} of the multiply-adds"


def _kind(value: Any) -> str:
    return "size" if isinstance(value, Mapping | SizeTarget) else "number"


Number = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Target = Annotated[Annotated[Number, Tag("number")] | Annotated[SizeTarget, Tag("size")], Discriminator(_kind)]


def target_text(target: Any) -> str:
    """A target as people read it, from settings or from what a table records of them."""
    if isinstance(target, Mapping):
        target = SizeTarget.model_validate(target)
    if isinstance(target, SizeTarget):
        return str(target)
    return f"{target:g}" if isinstance(target, int | float) else "not stated"


def megabytes(size: float) -> str:
    """As in `95.2 MB`; with all digits that make a difference of a thousand bytes."""
    return f"{size / 1e6:,.3f}".rstrip("0").rstrip(".") + " MB"


def size_name(size: int) -> str:
    """As in `95mb`: a size as a part of a name, with all its digits."""
    scale, unit = next(
        (10**power, unit) for power, unit in ((9, "gb"), (6, "mb"), (3, "kb"), (0, "b")) if size >= 10**power
    )
    return f"{size / scale:.9f}".rstrip("0").rstrip(".") + unit


@dataclass(frozen=True)
class FileFacts:
    """What decides how many bytes are left for the levels."""

    fixed: int
    """Bytes of the file beside the searched layers: header, tokenizer, norms, whatever has no levels."""
    dense: int
    """Bytes of the dense model's weights."""
    parameters: int
    multiply_adds: int = 0
    """For a token, of the dense model's linear layers and head; counted where the target bounds them."""
    source: int | None = None
    """Bytes of the quantized file that the model comes from."""


def require_below_source(target: SizeTarget, limit: int, source: int | None, where: str) -> None:
    """Refuse a file that is not smaller than the one that the model comes from.

    Args:
        target: of the search.
        limit: what the target comes to, in bytes.
        source: bytes of the quantized file that the model comes from; None where it comes from none.
        where: dotted path of the target, for messages.

    Raises:
        ConfigError: it is not smaller, and the settings do not allow that.
    """
    if source is not None and limit >= source and not target.above_source:
        raise ConfigError(
            f"{where}: {megabytes(limit)} is not below the quantized file that the model comes from "
            f"({megabytes(source)}), which is the dense model here: nothing larger can be better; lower it, or "
            "set `above_source: true`"
        )


def size_budgets(
    units: Sequence[Unit],
    target: SizeTarget,
    facts: FileFacts,
    where: str,
    limits: Sequence[tuple[int, int]] | None = None,
) -> tuple[int, ...]:
    """Most bytes that each group of units may take (groups in order of first appearance).

    Args:
        units: what is searched; bytes of their levels are those in the file.
        target: of the search.
        facts: of the file.
        where: dotted path of the target, for messages.
        limits: least and most bytes of each group, where they are not those of the levels alone.

    Raises:
        ConfigError: no choice of levels gives such a file, or the source is not larger.
    """
    limit = target.limit(facts.dense, facts.parameters)
    require_below_source(target, limit, facts.source, where)
    groups: dict[str, list[Unit]] = {}
    for unit in units:
        groups.setdefault(unit.group, []).append(unit)
    limits = limits or [(_bytes_of(members, min), _bytes_of(members, max)) for members in groups.values()]
    lowest, highest = (facts.fixed + sum(ends) for ends in zip(*limits, strict=True))
    if not lowest <= limit <= highest:
        least, most = (
            megabytes(-(-lowest // 1000) * 1000),
            megabytes(highest // 1000 * 1000),
        )  # as they can be asked for
        side, end = ("above", f"largest file ({most})") if limit > highest else ("below", f"smallest file ({least})")
        raise ConfigError(
            f"{where}: {megabytes(limit)} is {side} the {end} that the levels of these layers allow; choose a size "
            f"between {least} and {most}, or offer other levels"
        )
    parameters = [sum(unit.parameters for unit in members) for members in groups.values()]
    free = limit - facts.fixed
    wanted = [free * count // sum(parameters) for count in parameters]
    return share_out(free, wanted, limits)


def _bytes_of(units: Sequence[Unit], end: Any) -> int:
    return sum(end(level.bytes for level in unit.levels) for unit in units)
