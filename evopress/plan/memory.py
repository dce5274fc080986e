"""Memory that jobs ask a cluster for: what follows from the settings, on top of what every job takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evopress.artifacts.paths import EMBEDDING
from evopress.compression.base import LayerShape
from evopress.plan.model_config import size
from evopress.util.errors import CompressionError
from evopress.workflow.settings import Settings

_BLOCK = 16_000
"""MB for one block with all its variants, and the runtime."""
_MODEL = 48_000
"""MB for what is read of a whole model, variants or Hessians, and the runtime."""
_PROCESS = 12_000
"""MB for each process of a search, beside its budget."""


@dataclass(frozen=True)
class Memory:
    """Memory of the jobs that hold hidden states of all their tokens on the host, or a vocabulary's weights, in MB.

    ``attempt`` counts from 1: jobs that failed are tried again with more.
    """

    settings: Settings
    config: Mapping[str, Any]
    """Of the model; hidden states count for nothing where it does not tell their size."""

    def chain(self, attempt: int) -> int:
        """A block of a chain of variants: all calibration tokens pass through it."""
        return _BLOCK * attempt + self._states(self.settings.data.calibration.tokens)

    def polish(self, name: str, attempt: int) -> int:
        """All blocks, one after the other: all calibration tokens pass through, of both models where they differ."""
        states = self._states(self.settings.data.calibration.tokens)
        return _BLOCK * attempt + (2 if self.settings.searches[name].polish == "asymmetric" else 1) * states

    def embedding(self, name: str, attempt: int) -> int:
        """Variants of the input embedding and of the head, one after the other, each about a byte of a weight at most.

        The size of the vocabulary counts as far as the config tells it, and a head of its own unless that says no.
        """
        rows, columns = (size(self.config, key) or 0 for key in ("vocab_size", "hidden_size"))
        if not rows * columns:
            return _BLOCK * attempt
        method = self.settings.variants[name]
        layer = LayerShape(EMBEDDING, -1, EMBEDDING, EMBEDDING, rows, columns, self._itemsize())
        packed = len(method.labels()) * layer.parameters * (1 if self.config.get("tie_word_embeddings") is True else 2)
        try:
            working = method.peak_bytes([layer], 1e9 * self.settings.compute.memory_gb)
        except CompressionError:  # which the job will say
            working = 0
        return _BLOCK * attempt + (working + packed) // 1_000_000

    def hessians(self, attempt: int) -> int:
        """One shard of the calibration tokens."""
        tokens = self.settings.data.calibration.tokens or 0
        return (_BLOCK + _MODEL) * attempt + self._states(-(-tokens // self.settings.hessians.shards))

    def search(self, name: str, attempt: int) -> int:
        """All processes of a search: each has a budget, and the dense model's hidden states.

        They are of the whole search text, or, while single effects are measured, of some tokens in float32.
        """
        search, compute = self.settings.searches[name], self.settings.compute
        asked = max(search.tokens_asked().values(), default=0)
        states = max(self._states(self.settings.data.search.tokens), self._states(asked, itemsize=4)) if asked else 0
        each = int((_PROCESS + 1000 * compute.memory_gb) * attempt) + states
        return _MODEL * attempt + each * max(1, search.workers(compute.processes))

    def study(self, attempt: int) -> int:
        """A study that judges candidates, in one process."""
        each = int((_PROCESS + 1000 * self.settings.compute.memory_gb) * attempt)
        return _MODEL * attempt + each + self._states(self.settings.data.search.tokens)

    def evaluation(self, attempt: int) -> int:
        """Perplexity and KL: a compressed model's and the dense model's hidden states on one text after the other."""
        most = max((text.tokens or 0 for text in self.settings.data.evaluation.values()), default=0)
        return (_BLOCK + _MODEL) * attempt + 2 * self._states(most)

    def _states(self, tokens: int | None, itemsize: int | None = None) -> int:
        """Hidden states of so many tokens, of so many bytes for each number (None: as the device works)."""
        hidden = size(self.config, "hidden_size") or size(self.config, "n_embd") or 0
        return (tokens or 0) * hidden * (itemsize or self._itemsize()) // 1_000_000

    def _itemsize(self) -> int:
        """Bytes of a number: CPUs may work in float32 on the same weights."""
        dtype = self.settings.model.dtype
        if dtype == "source":
            dtype = self.config.get("dtype") or self.config.get("torch_dtype") or "bfloat16"
        return 4 if dtype == "float32" or self.settings.compute.device == "cpu" else 2
