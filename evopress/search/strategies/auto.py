"""The search that we know to be the best for its variants: what it does follows from them and from one number.

Layers start from the effect of each alone, dropped modules from the blocks that change the direction of hidden states
least, alone or consecutive ones together, as comparisons at equal tokens favour (docs/paper.md). An evolution goes on
from there, which keeps what it has unless a change is better beyond chance: on few tokens, what looks best is often
worse than the start. Of dropped modules, it first judges what each more or less would do, and tries the exchanges which
that favours. What SparseGPT has pruned is polished afterwards; integers gain little by that (docs/algorithm.md).
What `effort: thorough` gains has not been measured.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field

from evopress.compression.base import Method
from evopress.config.data import TextSettings
from evopress.search.base import Strategy
from evopress.search.evaluating import EvaluatingStrategy

EFFORTS: dict[str, dict[str, Any]] = {
    "quick": {
        "sensitivity_tokens": 128,
        "initial_tokens": 2048,
        "generations": 1,
        "offspring": 8,
        "survivors": (2, 1),
        "tokens": (512, 2048),
    },
    "standard": {
        "sensitivity_tokens": 512,
        "initial_tokens": 4096,
        "generations": 7,
        "offspring": 16,
        "survivors": (4, 1),
        "tokens": (1024, 4096),
    },
    "thorough": {
        "sensitivity_tokens": 2048,
        "initial_tokens": 16384,
        "generations": 60,
        "offspring": 32,
        "survivors": (8, 2, 1),
        "tokens": (1024, 4096, 16384),
    },
}
"""Settings of the evolution. A model of 210 layers is judged on 70 thousand, 0.5 and 7 million tokens."""
DEPTH: dict[str, dict[str, Any]] = {
    "quick": {"step_tokens": 128, "generations": 4, "tokens": (256, 2048)},
    "standard": {"step_tokens": 256, "generations": 11, "tokens": (512, 4096)},
    "thorough": {"step_tokens": 4096, "generations": 19},
}
"""What differs where modules are dropped: about the same tokens for a model of 60 modules."""
CONFIDENCE = 0.9
"""With which a choice is improved on: judged on so few tokens, chance would spoil a good start."""


class Auto(EvaluatingStrategy):
    """The best search that we know: an evolution from measured effects, or, for depth, from scores of blocks."""

    joint: ClassVar[bool] = True

    strategy: Literal["auto"] = "auto"
    effort: Literal["quick", "standard", "thorough"] = Field(
        "quick",
        description="How long it searches: for a model of 210 layers, on 70 thousand, half a million or 7 million "
        "tokens. A step that asks for more tokens than `data.search.tokens` has judges on all of them.",
    )

    def resolved(self, method: Method, text: TextSettings) -> Strategy:
        """The evolution that is run on a search ``text``."""
        from evopress.search.strategies.evolution import Evolution

        given = {key: getattr(self, key) for key in self.model_fields_set - {"strategy", "effort", "seed", "seeds"}}
        depth = DEPTH[self.effort] if method.family.takes_modules else {}
        settings = {**EFFORTS[self.effort], **depth, **_start(method), "confidence": CONFIDENCE}
        settings |= {key: _at_most(value, text.tokens) for key, value in settings.items() if "tokens" in key}
        if text.tokens is not None and text.tokens < 2 * text.sequence_length:  # there is nothing to compare
            del settings["confidence"]
        if method.gains_by_polish and len(self.sources) == 1:
            settings["polish"] = "sequential"
        evolution = Evolution(**settings | given)
        return evolution.model_copy(update={"seed": self.seed, "seeds": self.seeds})

    def least_tokens(self) -> int:
        """Of all steps."""
        return min(EFFORTS[self.effort]["tokens"])


def _start(method: Method) -> dict[str, Any]:
    """Settings that depend on what is searched."""
    if not method.family.takes_modules:
        return {"start": "sensitivity", "sensitivity_levels": 2, "group_rule": "none"}
    whole = getattr(method, "unit", "") != "pair" and not getattr(method, "exclude", ())
    return {"start": "scores" if whole else "sensitivity"}


def _at_most(tokens: Any, available: int | None) -> Any:
    """Tokens of one step or of several, as far as there are so many."""
    if available is None:
        return tokens
    return min(tokens, available) if isinstance(tokens, int) else tuple(min(step, available) for step in tokens)
