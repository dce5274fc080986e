"""lm-eval's own wrapper of transformers models, telling its progress as the rest of the workflow does."""

from collections.abc import Callable
from typing import Any

from lm_eval.models.huggingface import HFLM

from evopress.util.progress import Progress, progress


class ReportingLM(HFLM):
    """HFLM with our progress lines in place of its bar, which would fill a log with thousands of lines."""

    def __init__(self, description: str, **options: Any) -> None:
        super().__init__(**options)
        self._description = description
        self._progress: Progress | None = None

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """Log-likelihoods of continuations."""
        return self._report(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """Log-likelihoods of whole texts."""
        return self._report(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """Generated continuations."""
        return self._report(super().generate_until, requests)

    def _report(self, run: Callable[..., Any], requests: list[Any]) -> Any:
        with progress(f"tasks of {self._description}", len(requests), "requests") as self._progress:
            answers = run(requests, disable_tqdm=True)
            # Requests that share a forward pass were counted once.
            self._progress.advance(max(0, len(requests) - self._progress.done))
        return answers

    def _model_call(self, inps: Any, *arguments: Any, **options: Any) -> Any:
        self._count(len(inps))
        return super()._model_call(inps, *arguments, **options)

    def _model_generate(self, context: Any, *arguments: Any, **options: Any) -> Any:
        self._count(len(context))
        return super()._model_generate(context, *arguments, **options)

    def _count(self, sequences: int) -> None:
        if self._progress is not None:
            self._progress.advance(sequences)
