"""Where each artifact lies under results/<name>/; imports nothing heavy, since every cluster job parses it."""

from dataclasses import dataclass
from pathlib import Path

DENSE = "dense"
"""Name under which the uncompressed model is evaluated; no search may take it."""
HUGGINGFACE = "huggingface"
"""The exporter whose folder is evaluated, so that every search has it."""
GGUF = "gguf"
"""The exporter whose file is measured in its runtime."""
CARD, LEVEL_MAP = "README.md", "levels.png"
"""Model card in the folder of an export, and the picture that it shows."""
EMBEDDING = "embedding"
"""Stands for a block where artifacts are of the input embedding and the head."""


def block_name(block: int | str) -> str:
    """Name of a block in file names: three digits, so that listings sort."""
    return f"block_{block:03d}" if isinstance(block, int) else f"block_{block}"


@dataclass(frozen=True)
class Run:
    """The folder of one named run. Arguments may be Snakemake wildcards such as ``{block}``."""

    root: Path

    @property
    def model(self) -> Path:
        """Hugging Face folder of the dense model."""
        return self.root / "model"

    @property
    def model_manifest(self) -> Path:
        """Source, fingerprint and digests of the dense model (JSON)."""
        return self.root / "model.json"

    @property
    def layers(self) -> Path:
        """Table of the linear layers."""
        return self.root / "layers.parquet"

    def tokens(self, dataset: str) -> Path:
        """Tokens of ``calibration``, ``search`` or an evaluation set."""
        return self.root / "tokens" / f"{dataset}.parquet"

    def hessian_shard(self, shard: int | str, block: int | str) -> Path:
        """Hessians of one block from one token shard."""
        return self.root / "hessians" / f"shard_{shard}" / f"{block_name(block)}.safetensors"

    def hessian(self, block: int | str) -> Path:
        """Hessians of one block, or (`EMBEDDING`) of the head's input, from all calibration tokens."""
        return self.root / "hessians" / f"{block_name(block)}.safetensors"

    def variant_tensors(self, variants: str, block: int | str) -> Path:
        """Packed variants of one block, or (`EMBEDDING`) of the input embedding and the head."""
        return self.root / "variants" / variants / f"{block_name(block)}.safetensors"

    def variant_table(self, variants: str, block: int | str) -> Path:
        """Table of the variants of one block."""
        return self.root / "variants" / variants / f"{block_name(block)}.parquet"

    def made_tensors(self, variants: str, block: int | str) -> Path:
        """The same while a job of several blocks goes on, so that one that is killed need not make them again."""
        return self.root / "variants" / variants / "resume" / f"{block_name(block)}.safetensors"

    def made_table(self, variants: str, block: int | str) -> Path:
        """Their table, until then; none of these is a declared output."""
        return self.root / "variants" / variants / "resume" / f"{block_name(block)}.parquet"

    def made_state(self, variants: str, block: int | str) -> Path:
        """Hidden states after a block of a chain, until then."""
        return self.root / "variants" / variants / "resume" / f"state_of_{block_name(block)}.safetensors"

    def variants_log(self, variants: str, block: int | str) -> Path:
        """Log of the job that makes the variants of a block, and of those that follow where it makes several."""
        return self.root / "logs" / "variants" / variants / f"{block_name(block)}.log"

    def module_table(self, variants: str) -> Path:
        """Table of the modules that may be dropped; variants of this kind have no tensors."""
        return self.root / "variants" / variants / "modules.parquet"

    def chain_state(self, variants: str, block: int | str) -> Path:
        """Hidden states after a compressed block, which the next block of a chain starts from."""
        return self.root / "variants" / variants / "chain" / f"{block_name(block)}.safetensors"

    def effects(self, name: str) -> Path:
        """What each unit alone does to the model: a set of single effects, which searches share."""
        return self.root / "effects" / name / "effects.parquet"

    def effects_effort(self, name: str) -> Path:
        """Tokens and time that measuring them took."""
        return self.root / "effects" / name / "effort.parquet"

    def configuration(self, search: str) -> Path:
        """The level of every unit that a search chose."""
        return self.root / "search" / search / "configuration.parquet"

    def trace(self, search: str) -> Path:
        """Every evaluation that a search made."""
        return self.root / "search" / search / "trace.parquet"

    def progress(self, search: str) -> Path:
        """The best so far, generation by generation, on one fixed part of the search text."""
        return self.root / "search" / search / "progress.parquet"

    def effort(self, search: str) -> Path:
        """Tokens and time that a search spent."""
        return self.root / "search" / search / "effort.parquet"

    def resume(self, search: str) -> Path:
        """Folder of the state from which a killed search goes on; not a declared output."""
        return self.root / "search" / search / "resume"

    def polished_tensors(self, search: str, block: int | str) -> Path:
        """The levels that a search chose in one block, made anew: packed as variants are."""
        return self.root / "search" / search / "polished" / f"{block_name(block)}.safetensors"

    def polished_table(self, search: str, block: int | str) -> Path:
        """Table of these, as of variants."""
        return self.root / "search" / search / "polished" / f"{block_name(block)}.parquet"

    def polish_effort(self, search: str) -> Path:
        """Tokens and time that took, written once all blocks are there."""
        return self.root / "search" / search / "polished" / "effort.parquet"

    def polish_state(self, search: str) -> Path:
        """Hidden states from which a killed polish goes on; not a declared output."""
        return self.root / "search" / search / "polished" / "resume" / "hidden.safetensors"

    def export(self, search: str, exporter: str) -> Path:
        """Folder of a compressed model as an exporter writes it."""
        return self.root / "exports" / search / exporter

    def export_manifest(self, search: str, exporter: str) -> Path:
        """Digests and provenance of that folder (JSON), written last."""
        return self.root / "exports" / search / f"{exporter}.json"

    def card(self, search: str, exporter: str) -> Path:
        """Model card in that folder; written again once the model is measured."""
        return self.export(search, exporter) / CARD

    def level_map(self, search: str, exporter: str) -> Path:
        """Picture of the levels, which the card shows."""
        return self.export(search, exporter) / LEVEL_MAP

    def perplexity(self, search: str) -> Path:
        """Perplexity, KL and agreement by data set, of a search or of the dense model."""
        return self.root / "evaluation" / search / "perplexity.parquet"

    def tasks(self, search: str) -> Path:
        """lm-eval results as a table."""
        return self.root / "evaluation" / search / "tasks.parquet"

    def tasks_json(self, search: str) -> Path:
        """lm-eval results as its own JSON."""
        return self.root / "evaluation" / search / "tasks.json"

    def runtime(self, search: str) -> Path:
        """What a GGUF file does in llama.cpp: that of a search, or of the dense model in F16."""
        return self.root / "evaluation" / search / "runtime.parquet"

    def dense_hidden(self, dataset: str) -> Path:
        """Final hidden states of the dense model on an evaluation set."""
        return self.root / "evaluation" / DENSE / f"hidden_{dataset}.safetensors"

    @property
    def report(self) -> Path:
        """The report (one HTML file)."""
        return self.root / "report.html"

    @property
    def summary(self) -> Path:
        """The comparison table as plain text."""
        return self.root / "summary.txt"


def manifest_path(tensors: Path) -> Path:
    """JSON manifest (sha256, bytes, provenance) beside a safetensors file."""
    return tensors.with_suffix(".json")
