"""The two text formats of configurations that are published with the paper (arXiv 2410.14649), read and written.

Quantization and sparsity: one linear layer a line, `model.layers.0.self_attn.q_proj: 3`. The level is a bit-width, or a
number of steps from the target sparsity, where more steps remove more. (Our own: a pattern, as `2:4`; the name of a
GGUF type, as `Q4_K`; and lines for the input embedding and the head, where they have levels.)
Depth: one block a line, in order: `none`, `attn`, `mlp` or `attn+mlp` says what is dropped of it.
Lines that start with `#` are comments.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from evopress.util.errors import ConfigError

DROPS = {
    "none": frozenset[str](),
    "attn": frozenset({"attn"}),
    "mlp": frozenset({"mlp"}),
    "attn+mlp": frozenset({"attn", "mlp"}),
}
"""Kinds of modules that each word drops."""
_WORDS = {kinds: word for word, kinds in DROPS.items()}
_MOST_BYTES = 1 << 24
"""Many times what the largest model needs; no more is read of whatever else was named."""
_SHOWN = 60


@dataclass(frozen=True)
class LayerLine:
    """The level of a linear layer."""

    line: int
    """Counted from 1."""
    layer: str
    level: str


def read_text(path: Path, where: str) -> str:
    """Text of a file.

    Args:
        path: the file.
        where: dotted path of the setting that names it, for messages.

    Raises:
        ConfigError: it is missing, no text, or far too long.
    """
    try:
        if path.stat().st_size > _MOST_BYTES or not path.is_file():
            raise ConfigError(f"{where}: {path} is no text configuration (a file of a few thousand lines)")
        content = path.read_bytes()
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{where}: {path} is not there; check the path") from None
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{where}: {path}, line {line}: is no text in UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{where}: {path} cannot be read ({error.strerror})") from error


def parse_levels(text: str, where: str) -> list[LayerLine]:
    """Read one level per linear layer; empty lines count as lines and say nothing.

    Args:
        text: lines of `layer: level`.
        where: what messages start with, as in `searches.mine.file: levels.txt`.

    Raises:
        ConfigError: a line is not of this format, or a layer has two; the message names the line.
    """
    lines = [_layer_line(number, line, where) for number, line in _lines(text) if line]
    if not lines:
        raise ConfigError(f"{where}, line 1: nothing is here; a line for each layer is needed, as in `layer.name: 3`")
    first: dict[str, int] = {}
    for line in lines:
        if (before := first.setdefault(line.layer, line.line)) != line.line:
            raise ConfigError(f"{where}, line {line.line}: {shown(line.layer)} has a level already, in line {before}")
    return lines


def parse_drops(text: str, where: str) -> list[frozenset[str]]:
    """Read the kinds of modules that each block loses; block 0 stands in the first line that is no comment.

    Args:
        text: lines of `none`, `attn`, `mlp` or `attn+mlp`.
        where: what messages start with, as in `searches.mine.file: drops.txt`.

    Raises:
        ConfigError: a line says something else; the message names it.
    """
    return [_dropped(number, line, where) for number, line in _lines(text.rstrip())]


def format_levels(levels: Iterable[tuple[str, str]]) -> str:
    """Text of (layer, level); steps are plain integers (3, -3), as the published code names its files."""
    return "".join(f"{layer}: {level.removeprefix('+')}\n" for layer, level in levels)


def format_drops(dropped: Sequence[frozenset[str]]) -> str:
    """Text of the kinds of modules that are dropped of each block."""
    return "".join(f"{_WORDS[kinds]}\n" for kinds in dropped)


def shown(text: str) -> str:
    """Foreign text as it may stand in a message: quoted, in one line, not too long."""
    quoted = repr(text)
    return quoted if len(quoted) <= _SHOWN else f"{quoted[:_SHOWN]}..."


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, as an editor counts them; other separators of Unicode do not end a line."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.lstrip(" \t").startswith("#"):
            yield number, line.strip(" \t\r")


def _layer_line(number: int, line: str, where: str) -> LayerLine:
    if line in DROPS:
        raise ConfigError(
            f"{where}, line {number}: {shown(line)} says which modules a block loses, but layers have levels here; "
            "name variants with `method: drop`"
        )
    # No layer has a colon in its name, but a pattern does: `layer: 2:4`.
    match = re.fullmatch(r"([^\s:]+)[ \t]*:[ \t]*([+-]?[0-9]{1,9}|[0-9]{1,9}:[0-9]{1,9}|[A-Z][A-Z0-9_]{1,15})", line)
    if match is None:
        raise ConfigError(f"{where}, line {number}: {shown(line)} is not of the form `layer.name: level`")
    return LayerLine(number, match[1], match[2])


def _dropped(number: int, line: str, where: str) -> frozenset[str]:
    if line in DROPS:
        return DROPS[line]
    hint = f"one of {', '.join(DROPS)} says what the block loses"
    if ":" in line:
        hint = "this is the format of levels; name variants that quantize or prune"
    raise ConfigError(f"{where}, line {number}: {shown(line)}: {hint}")
