"""What no text in the settings may hold: it goes into paths, command lines and files of JSON."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

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
