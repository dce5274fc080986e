"""The plain evaluator: one candidate at a time, one full forward pass each, full logits of the dense model kept."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM

from evopress.compression.base import Unit
from evopress.search.engine.weights import Unpack
from evopress.search.evaluation import Minibatch


class PlainEvaluator:
    """A Hugging Face model whose linear weights are swapped for each candidate.

    Only layers whose level differs from the candidate before are unpacked, as the published code loads them.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        units: Sequence[Unit],
        unpack: Unpack,
        tokens: Tensor,
        device: torch.device | str = "cpu",
    ) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.model = model.to(device).eval().requires_grad_(False)
        self.units, self.unpack, self.tokens = units, unpack, tokens.to(device)
        with torch.inference_mode():
            rows = [self.model(row[None], use_cache=False).logits for row in self.tokens]
        self.teacher = torch.cat(rows)
        """Logits of the dense model, [sequences, length, vocabulary]."""
        self.loaded: list[int | None] = [None] * len(units)

    @property
    def held_bytes(self) -> int:
        """Weights and the teacher's logits."""
        return sum(parameter.nbytes for parameter in self.model.parameters()) + self.teacher.nbytes

    @torch.inference_mode()
    def evaluate(self, candidates: NDArray[np.int16], minibatch: Minibatch) -> list[float]:
        """Fitness of each of ``candidates`` [C, units] on whole sequences of equal length."""
        (segment,) = minibatch.segments()
        rows = torch.tensor(minibatch.sequences)
        ids = self.tokens[rows, : segment[2]]
        teacher = self.teacher[rows, : segment[2]].flatten(0, 1)
        return [self._fitness(candidate, ids, teacher) for candidate in candidates]

    def _fitness(self, candidate: NDArray[np.int16], ids: Tensor, teacher: Tensor) -> float:
        for index, (unit, level) in enumerate(zip(self.units, candidate.tolist(), strict=True)):
            if self.loaded[index] != level:
                weight = self.model.get_submodule(unit.name).weight
                weight.data = self.unpack(unit.block, unit.layer, unit.levels[level].label)
                self.loaded[index] = level
        logits = self.model(ids, use_cache=False).logits.flatten(0, 1)
        log_q, log_p = (log_softmax(values, dim=-1, dtype=torch.float32) for values in (logits, teacher))
        return float(kl_div(log_q, log_p, log_target=True, reduction="batchmean"))
