"""llama.cpp's own quantizer, the program `llama-quantize`, run on a file of ours.

The one at hand comes with the wheel `ik-llama-cpp-python`: a fork, whose mixtures use types that only it knows. It is
told the type of every tensor, as llama.cpp would have it. Of another program, which the settings name, only the help is
read, to see which of the two it is.
"""

import re
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from evopress.artifacts.atomic import atomic_file
from evopress.models.gguf_header import whole_header
from evopress.util.errors import ConfigError, ModelError
from evopress.util.progress import log
from studies.recipes import Sizes, tensor_types
from studies.settings import INSTALL


@dataclass(frozen=True)
class Quantizer:
    """A program `llama-quantize`."""

    program: Path

    @cached_property
    def takes_rules(self) -> bool:
        """Whether it is the fork, which is told the type of each tensor, and reads imatrix files of before 2025 only.

        Raises:
            ConfigError: it does not run, or is another program.
        """
        try:
            done = subprocess.run([self.program, "--help"], capture_output=True, text=True, check=False)
        except OSError as error:
            raise ConfigError(f"studies.peers.quantizer: {self.program} does not run ({error}); {INSTALL}") from error
        told = done.stdout + done.stderr
        if "--token-embedding-type" not in told:
            raise ConfigError(f"studies.peers.quantizer: {self.program} is no llama-quantize; {INSTALL}")
        return "--custom-q" in told

    def quantize(
        self, source: Path, target: Path, mixture: str, embedding: str | None, imatrix: Path, threads: int
    ) -> None:
        """Write ``target``, a file of the whole model.

        Args:
            source: GGUF file of the dense model.
            target: the file; it is put in place whole.
            mixture: as in Q3_K_M.
            embedding: type of the token embedding; None is the one that the mixture has for it.
            imatrix: of the model, in GGUF; beside it lies the same in the binary form.
            threads: of the work.

        Raises:
            ConfigError: the program does not run.
            ModelError: it fails; the line that says why is kept.
        """
        importance = imatrix.with_suffix(".dat") if self.takes_rules else imatrix
        options: list[str | Path] = ["--imatrix", importance, *self._types(source, mixture, embedding)]
        with atomic_file(target) as new:
            command = [self.program, *options, source, new, mixture, str(threads)]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            if done.returncode or not new.stat().st_size:
                lines = (done.stdout + done.stderr).strip().splitlines() or ["it said nothing"]
                wrong = [line for line in lines if "fail" in line or "error" in line.lower()] or lines
                raise ModelError(f"{self.program.name} cannot make {mixture} of {source}: {wrong[-1].strip()}")
        log.info("%s: %.1f MB", target, target.stat().st_size / 1e6)

    def _types(self, source: Path, mixture: str, embedding: str | None) -> list[str]:
        """Options that say which type each tensor gets."""
        if not self.takes_rules:
            return [] if embedding is None else ["--token-embedding-type", _ggml_name(embedding)]
        types = types_of(source, mixture)
        if embedding is not None:
            types["token_embd.weight"] = embedding
        rules = [f"^{re.escape(name)}$={_ggml_name(kind)}" for name, kind in types.items()]
        return ["--custom-q", ",".join(rules)]


def types_of(source: Path, mixture: str) -> dict[str, str]:
    """Type of each weight matrix of a GGUF file in a mixture, as llama.cpp has it."""
    header = whole_header(source)
    columns = {
        name: tensor.shape[-1]
        for name, tensor in header.tensors.items()
        if len(tensor.shape) == 2 and name.endswith(".weight")
    }
    asked = ("block_count", "attention.head_count", "attention.head_count_kv")
    blocks, heads, keys = (header.metadata[f"{header.architecture}.{key}"] for key in asked)
    return tensor_types(mixture, columns, Sizes(blocks, heads // keys))


def _ggml_name(kind: str) -> str:
    """What the program calls a type, as in `q4_K` and `iq3_s`."""
    return f"{kind.lower()[:-1]}K" if kind.endswith("_K") else kind.lower()
