"""Keys: a digest of all that the result of a stage depends on, beside the user's own files.

A key covers the stage's slice of the settings, the code that it runs, and the keys of the stages before it. The
workflow hands each job its key as a parameter: Snakemake runs a job again where its key is another than before, and a
finished artifact that records its key can be told from one that is out of date.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from evopress.artifacts.paths import DENSE
from evopress.workflow import slices
from evopress.workflow.code_dependencies import code_digest
from evopress.workflow.settings import Settings
from evopress.workflow.stages import module_of


@dataclass(frozen=True)
class Keys:
    """Keys of the jobs of a run."""

    settings: Settings
    root: Path = Path()
    """Folder that holds the package."""

    @cached_property
    def _known(self) -> dict[tuple[str, ...], str]:
        return {}

    def model(self) -> str:
        """Of the dense model."""
        return self._key("model", slices.model_slice(self.settings))

    def tokens(self, dataset: str) -> str:
        """Of a text's tokens."""
        return self._key("tokens", slices.tokens_slice(self.settings, dataset), self.model())

    def hessians(self) -> str:
        """Of the Hessians of every block, from one shard or from all."""
        stages = ["hessians", *(["hessian_sum"] if self.settings.hessians.shards > 1 else [])]
        before = [self.tokens("calibration")]
        for stage in stages:
            before = [self._key(stage, slices.hessians_slice(self.settings), *before)]
        return before[0]

    def variants(self, name: str) -> str:
        """Of a database of variants."""
        method = self.settings.variants[name]
        before = self.model()
        if method.needs_hessians:
            before = self.hessians()
        elif method.stage == "variants_chain":
            before = self.tokens("calibration")
        return self._key(method.stage, slices.variants_slice(self.settings, name), before, plugins=[method])

    def search(self, name: str) -> str:
        """Of what a search chose."""
        strategy = self.settings.searches[name]
        before = [self.tokens("search"), self.variants(strategy.variants), *map(self.search, strategy.depends_on())]
        if strategy.needs_hessians:
            before.append(self.hessians())
        return self._key("search", slices.search_slice(self.settings, name), *before, plugins=[strategy])

    def export(self, stage: str, search: str) -> str:
        """Of a model that is made of what a search chose, by one of the stages that do so."""
        return self._key(stage, "{}", self.search(search))

    def evaluation(self, stage: str, model: str) -> str:
        """Of a measurement (``perplexity`` or ``tasks``) of a search's model, or of the dense one."""
        before = [self.model() if model == DENSE else self.export("stitch", model)]
        if stage == "tasks":
            return self._key(stage, slices.tasks_slice(self.settings), *before)
        before += map(self.tokens, self.settings.data.evaluation)
        return self._key(stage, slices.perplexity_slice(self.settings), *before)

    def card(self, search: str) -> str:
        """Of a model card."""
        return self._key("card", "{}", self.evaluation("perplexity", search), self.evaluation("perplexity", DENSE))

    def report(self, others: Mapping[str, str]) -> str:
        """Of the report; ``others`` are further things that it shows, by name."""
        models = [DENSE, *self.settings.searches]
        before = [self.evaluation(stage, model) for stage in ("perplexity", "tasks") for model in models]
        return self._key("report", json.dumps(others), *before)

    def _key(self, stage: str, settings: str, *before: str, plugins: tuple[object, ...] | list[object] = ()) -> str:
        """Digest of a stage's slice of the settings, its code with that of the plug-ins it uses, and earlier keys."""
        modules = (module_of(stage), *(type(plugin).__module__ for plugin in plugins))
        if modules not in self._known:
            self._known[modules] = code_digest(modules, self.root)
        content = json.dumps([stage, settings, self._known[modules], *before])
        return hashlib.sha256(content.encode()).hexdigest()[:16]
