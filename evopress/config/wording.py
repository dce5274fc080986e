"""Pydantic's reports on settings, in the words of those who write YAML."""

import difflib
from typing import Any

from pydantic_core import ErrorDetails


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
