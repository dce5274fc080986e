"""Random models of the shapes of real ones, prepared as runs, with settings that plan them."""

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from finished_run import write_tokenizer, write_tokens
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import read_model_fingerprint
from evopress.compression.methods.gptq import Gptq
from evopress.config.context import ComputeSettings, StageContext
from evopress.config.model import FolderModel
from evopress.models.sources import prepare_model
from evopress.search.strategies.evolution import Evolution
from evopress.workflow.settings import Settings

_LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
_TWO_BLOCKS_OF_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
_SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "tie_word_embeddings": True,
}
_WIDER = {**_SMALL, "hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": 2, "tie_word_embeddings": False}
SHAPES = {"1B": _LLAMA_1B, "8B": _TWO_BLOCKS_OF_8B, "small": _SMALL}
"""Of Llama 3.2 1B, of two blocks of Llama 3.1 8B, and of one that any CPU judges in no time."""
REDUCED = {"1B": _SMALL, "8B": _WIDER, "small": _SMALL}
"""What takes their places in a check of reduced size."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    length: int
    """Tokens of a sequence."""
    calibration: int
    """Tokens of the model of a 1B's shape; the two blocks of an 8B take a quarter."""
    evaluation: int
    offspring: int
    survivors: tuple[int, ...]
    tokens: tuple[int, ...]
    """Of each selection step; as many as the last are in the search text."""
    group_size: int


FULL = Sizes(2048, 1 << 16, 1 << 16, 128, (16, 4, 1), (2048, 16384, 131072), 128)
"""The paper's settings for quantization, for one generation."""
SHORT = Sizes(64, 1024, 512, 8, (4, 2, 1), (64, 128, 256), 64)


@dataclass(frozen=True)
class Machine:
    """What is checked: a device, in full or at reduced size, and a folder for what is made on the way."""

    device: torch.device
    full: bool
    folder: Path

    @property
    def sizes(self) -> Sizes:
        """How much is measured."""
        return FULL if self.full else SHORT

    @cached_property
    def dtype(self) -> torch.dtype:
        """The 16-bit type that the device multiplies fast; float32 on a CPU, where sizes are reduced anyway."""
        if self.device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.get_device_capability(self.device) >= (8, 0) else torch.float16

    @cached_property
    def memory_gb(self) -> float:
        """Memory for weights and hidden states: most of what is free on a card, but no more than 40 GB."""
        if self.device.type == "cpu":
            return 0.5
        return min(40.0, 0.8 * torch.cuda.mem_get_info(self.device)[0] / 1e9)

    def context(self, run: Run, memory_gb: float | None = None) -> StageContext:
        """What stages are given."""
        return StageContext(run, ComputeSettings(device=str(self.device), memory_gb=memory_gb or self.memory_gb))

    def model(self, name: str, dtype: torch.dtype | None = None) -> Run:
        """The run of a random model of a shape of `SHAPES`, with tokens; made once."""
        dtype = dtype or self.dtype
        run = Run(self.folder / f"{name}-{str(dtype).removeprefix('torch.')}")
        if not run.tokens("text").exists():
            _prepare(self, run, (SHAPES if self.full else REDUCED)[name], dtype)
        return run

    def settings(self, run: Run, memory_gb: float | None = None) -> Settings:
        """Settings whose plan is that of the measurements."""
        sizes, text = self.sizes, {"source": "file", "path": "text.txt", "sequence_length": self.sizes.length}
        return Settings.load(
            {
                "complete": True,
                "name": "check",
                "model": {"source": "folder", "path": str(run.model)},
                "data": {
                    "calibration": text | {"tokens": calibration_tokens(run, sizes)},
                    "search": text | {"tokens": sizes.tokens[-1]},
                    "evaluation": {"text": text | {"tokens": sizes.evaluation}},
                },
                "variants": {"gptq": Gptq(group_size=sizes.group_size).model_dump(mode="json")},
                "searches": {"paper": self.search().model_dump(mode="json", exclude_unset=True)},
                "compute": {"device": str(self.device), "memory_gb": memory_gb or self.memory_gb},
            }
        )

    def search(self) -> Evolution:
        """One generation of a search for 3 bits."""
        sizes = self.sizes
        return Evolution(
            strategy="evolution",
            variants="gptq",
            target=3.0,
            generations=1,
            offspring=sizes.offspring,
            survivors=sizes.survivors,
            tokens=sizes.tokens,
            initial_tokens=sizes.tokens[0],
        )


def calibration_tokens(run: Run, sizes: Sizes) -> int:
    """Tokens that the Hessians of a model are made of."""
    return sizes.calibration // (4 if run.root.name.startswith("8B") else 1)


def _prepare(machine: Machine, run: Run, shape: dict[str, object], dtype: torch.dtype) -> None:
    sizes, source = machine.sizes, run.root / "source"
    write_random_model(source, LlamaConfig(max_position_embeddings=8192, dtype=dtype, **shape), machine.device)
    prepare_model(FolderModel(path=str(source)), run)
    fingerprint, vocabulary = read_model_fingerprint(run), int(str(shape["vocab_size"]))
    counts = {"calibration": calibration_tokens(run, sizes), "search": sizes.tokens[-1], "text": sizes.evaluation}
    for seed, (dataset, count) in enumerate(counts.items()):
        sequences = count // sizes.length
        write_tokens(run, dataset, sequences, sizes.length, seed, fingerprint, vocabulary=vocabulary)


def write_random_model(folder: Path, config: LlamaConfig, device: torch.device) -> None:
    """Write a model whose weights are drawn on ``device``, matrix by matrix, so that logits differ by about 1."""
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            tensors[name] = torch.ones(parameter.shape, dtype=config.dtype)
            continue
        drawn = torch.randn(parameter.shape, generator=generator, device=device)
        tensors[name] = drawn.mul_(parameter.shape[1] ** -0.5).to(config.dtype).cpu()
    folder.mkdir(parents=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    write_tokenizer(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def forget(run: Run) -> None:
    """Free the disk that a run takes."""
    shutil.rmtree(run.root, ignore_errors=True)
