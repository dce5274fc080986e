"""Keys: a digest of all that the result of a stage depends on, beside the user's own files.

A key covers the stage's slice of the settings, the code that it runs, and the keys of the stages before it. The
workflow hands each job its key as a parameter: Snakemake runs a job again where its key is another than before, and a
finished artifact that records its key can be told from one that is out of date.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from evopress.artifacts.paths import DENSE, GGUF, HUGGINGFACE
from evopress.search.target import SizeTarget
from evopress.workflow import slices
from evopress.workflow.code_dependencies import code_digest
from evopress.workflow.settings import Settings
from evopress.workflow.stages import STAGES


@dataclass(frozen=True)
class Keys:
    """Keys of the jobs of a run."""

    settings: Settings
    root: Path = Path()
    """Folder that holds the package."""

    @cached_property
    def _digests(self) -> dict[tuple[str, ...], str]:
        """Of code, by the modules that it starts from."""
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
        method, stage, before = self.settings.variants[name], "variants", self.hessians
        if not method.per_block:
            stage, before = "variants_modules", self.model
        elif method.sequential:
            stage, before = "variants_sequential", lambda: self.tokens("calibration")
        elif not method.needs_hessians:
            before = self.model
        return self._key(stage, slices.variants_slice(self.settings, name), before(), plugins=[method])

    def effects(self, name: str) -> str:
        """Of a set of single effects."""
        sources = slices.effects(self.settings)[name].sources
        before = [self.tokens("search"), *map(self.variants, sources)]
        return self._key("effects", slices.effects_slice(self.settings, name), *before)

    def search(self, name: str) -> str:
        """Of what a search chose."""
        strategy = self.settings.searches[name]
        before = [
            self.tokens("search"),
            *map(self.variants, strategy.sources),
            *map(self.search, strategy.depends_on()),
        ]
        if (effects := strategy.effects()) is not None:
            before.append(self.effects(effects.name))
        if strategy.needs_hessians:
            before.append(self.hessians())
        target = strategy.target
        sized = [target.file] if isinstance(target, SizeTarget) and target.file is not None else []
        return self._key("search", slices.search_slice(self.settings, name), *before, plugins=[strategy, *sized])

    def polish(self, name: str) -> str:
        """Of what a search chose, made anew."""
        strategy = self.settings.searches[name]
        before, method = [self.search(name), self.tokens("calibration")], self.settings.variants[strategy.sources[0]]
        return self._key("polish", slices.polish_slice(self.settings, name), *before, plugins=[method])

    def export(self, search: str, exporter: str) -> str:
        """Of the model that a search chose, as an exporter writes it."""
        own = self.settings.exporter_of(search, exporter)
        chosen = self.polish if self.settings.searches[search].polishes else self.search
        before = [chosen(search), *(self.export(search, one) for one in own.reads)]
        return self._key("export", own.model_dump_json(), *before, plugins=[own])

    def evaluation(self, stage: str, model: str) -> str:
        """Of a measurement (``perplexity``, ``tasks`` or ``runtime``) of a search's model, or of the dense one."""
        before = [self.model() if model == DENSE else self.export(model, HUGGINGFACE)]
        if stage == "tasks":
            return self._key(stage, slices.tasks_slice(self.settings), *before)
        before += map(self.tokens, self.settings.data.evaluation)
        if stage == "runtime":
            before += [self.model(), *([] if model == DENSE else [self.export(model, GGUF)])]
            before.append(slices.perplexity_slice(self.settings))
            return self._key(stage, slices.runtime_slice(self.settings), *before)
        return self._key(stage, slices.perplexity_slice(self.settings), *before)

    def card(self, search: str, exporter: str) -> str:
        """Of the model card of an export."""
        measured = [self.evaluation("perplexity", model) for model in (search, DENSE)]
        if exporter == GGUF and search in self.settings.in_runtime():
            measured.append(self.evaluation("runtime", search))
        own = self.settings.exporter_of(search, exporter)
        told = slices.card_slice(self.settings)
        return self._key("card", told, self.export(search, exporter), *measured, plugins=[own])

    def report(self) -> str:
        """Of the report."""
        measured = [("perplexity", model) for model in (DENSE, *self.settings.searches)]
        measured += [("tasks", model) for model in self.settings.on_tasks()]
        measured += [("runtime", model) for model in self.settings.in_runtime()]
        return self._key("report", "{}", *(self.evaluation(kind, model) for kind, model in measured))

    def of(self, modules: Sequence[str], settings: str, *before: str) -> str:
        """Key of what ``modules`` make from a slice of the settings and what has the keys ``before``."""
        named = tuple(modules)
        if named not in self._digests:
            self._digests[named] = code_digest(named, self.root)
        return hashlib.sha256(json.dumps([settings, self._digests[named], *before]).encode()).hexdigest()[:16]

    def _key(self, stage: str, settings: str, *before: str, plugins: Sequence[object] = ()) -> str:
        return self.of([STAGES[stage].module, *(type(plugin).__module__ for plugin in plugins)], settings, *before)
