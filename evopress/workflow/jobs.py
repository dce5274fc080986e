"""What jobs ask a cluster for: memory, devices and minutes, and how many blocks' variants one job makes.

Every parse of the workflow asks, so nothing heavy is imported. The memory of jobs that hold hidden states of all their
tokens on the host, or a vocabulary's weights, follows from the settings, on top of what every job takes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evopress.artifacts.paths import EMBEDDING
from evopress.compression.layers import LayerShape
from evopress.config.context import ComputeSettings
from evopress.models.config_file import gguf_parameters, size
from evopress.search.base import EffectsSettings, Strategy
from evopress.util.errors import CompressionError
from evopress.workflow.settings import Settings

_BLOCK = 16_000
"""MB for one block with all its variants, and the runtime."""
_MODEL = 48_000
"""MB for what is read of a whole model, variants or Hessians, and the runtime."""
_PROCESS = 12_000
"""MB for each process of a search, beside its budget."""
_WEIGHTS = 64_000_000
"""Most weights of the blocks of a job that makes variants: to start takes as long as a block of a small model does."""
_JOBS = 8
"""Fewest jobs that blocks are shared among, so that they can run beside one another."""
_MINUTES = 60
"""That a cluster gives the usual job."""


@dataclass(frozen=True)
class Memory:
    """MB of jobs; ``attempt`` counts from 1, as jobs that failed are tried again with more."""

    settings: Settings
    config: Mapping[str, Any]
    """Of the model; hidden states count for nothing where it does not tell their size."""

    def model(self, attempt: int) -> int:
        """A GGUF file's weights are held whole, in float32 and in the type of the model; all else file by file."""
        return _BLOCK * attempt + (gguf_parameters(self.settings.model) or 0) * 8 // 1_000_000

    def variants(self, attempt: int) -> int:
        """Blocks that are independent of one another, one after the other."""
        return _BLOCK * attempt

    def chain(self, attempt: int, models: int = 1) -> int:
        """A block after another: all calibration tokens pass through, of so many models."""
        return _BLOCK * attempt + models * self._states(self.settings.data.calibration.tokens)

    def polish(self, name: str, attempt: int) -> int:
        """The same of what a search chose; where the dense model runs beside it, of both."""
        return self.chain(attempt, 2 if self.settings.searches[name].polish == "asymmetric" else 1)

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
            working = method.for_embedding().peak_bytes([layer], 1e9 * self.settings.compute.host_gb)
        except CompressionError:  # which the job will say
            working = 0
        return _BLOCK * attempt + (working + packed) // 1_000_000

    def hessians(self, attempt: int) -> int:
        """One shard of the calibration tokens."""
        tokens = self.settings.data.calibration.tokens or 0
        return (_BLOCK + _MODEL) * attempt + self._states(-(-tokens // self.settings.hessians.shards))

    def search(self, name: str, attempt: int) -> int:
        """All processes of a search: each has a budget, and the dense model's hidden states."""
        return self.effects(self.settings.searches[name], attempt)

    def effects(self, search: Strategy | EffectsSettings, attempt: int) -> int:
        """The same of single effects, whose hidden states are in float32, and of some of the search text."""
        compute, asked = self.settings.compute, max(search.tokens_asked().values(), default=0)
        states = max(self._states(self.settings.data.search.tokens), self._states(asked, itemsize=4)) if asked else 0
        return _MODEL * attempt + (self._budget(attempt) + states) * max(1, search.workers(compute.processes))

    def study(self, attempt: int) -> int:
        """A study that judges candidates, in one process."""
        return _MODEL * attempt + self._budget(attempt) + self._states(self.settings.data.search.tokens)

    def evaluation(self, attempt: int) -> int:
        """Perplexity and KL: a compressed model's and the dense model's hidden states on one text after the other."""
        most = max((text.tokens or 0 for text in self.settings.data.evaluation.values()), default=0)
        return (_BLOCK + _MODEL) * attempt + 2 * self._states(most)

    @property
    def hidden_size(self) -> int:
        """Of the model; 0 where its config does not tell."""
        return size(self.config, "hidden_size") or size(self.config, "n_embd") or 0

    def _budget(self, attempt: int) -> int:
        return int((_PROCESS + 1000 * self.settings.compute.host_gb) * attempt)

    def _states(self, tokens: int | None, itemsize: int | None = None) -> int:
        """Hidden states of so many tokens, of so many bytes for each number (None: as the device works)."""
        return (tokens or 0) * self.hidden_size * (itemsize or self._itemsize()) // 1_000_000

    def _itemsize(self) -> int:
        """Bytes of a number: CPUs may work in float32 on the same weights."""
        dtype = self.settings.model.dtype
        if dtype == "source":
            dtype = self.config.get("dtype") or self.config.get("torch_dtype") or "bfloat16"
        return 4 if dtype == "float32" or self.settings.compute.device == "cpu" else 2


def devices_of_job(compute: ComputeSettings) -> int:
    """One for a job that runs a model, unless the settings ask for CPUs."""
    return 0 if compute.device == "cpu" else 1


def devices_of_search(search: Strategy | EffectsSettings, compute: ComputeSettings) -> int:
    """One for each process of a search, or of single effects, that makes use of it."""
    return devices_of_job(compute) * search.workers(compute.processes)


def blocks_per_job(settings: Settings, hidden_size: int, blocks: int) -> int:
    """Blocks of the jobs of the variants stage; the last one may have fewer.

    Args:
        settings: of the run; what they ask for is taken as it is.
        hidden_size: of the model, 0 where its config does not tell.
        blocks: of the model.
    """
    usual = min(_usual(settings, hidden_size), -(-blocks // _JOBS))
    return min(settings.compute.blocks_per_job or usual, blocks)


def minutes(settings: Settings, hidden_size: int, blocks: int, attempt: int) -> int:
    """Minutes that a cluster gives such a job: more where the settings ask for more blocks than is usual."""
    own = blocks_per_job(settings, hidden_size, blocks)
    return _MINUTES * attempt * -(-own // _usual(settings, hidden_size))


def is_small(settings: Settings, hidden_size: int) -> bool:
    """Whether a job takes about as long to start as to work on a block of the model."""
    return _usual(settings, hidden_size) > 1


def _usual(settings: Settings, hidden_size: int) -> int:
    """The most blocks of a job, by the size of the model alone, about 12 hidden_size^2 weights a block.

    The answer is the same before the model is there and after, in Snakemake and in the jobs of a cluster.
    """
    if settings.model.config_comes_late:
        return _WEIGHTS if settings.model.quantized else 1
    return max(1, _WEIGHTS // (12 * hidden_size**2)) if hidden_size else 1
