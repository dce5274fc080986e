"""Exported GGUF files in llama.cpp itself: whether they compute what was judged, and what memory and time that takes.

What this package computes of the search's Hugging Face folder, in float32, is the reference. A file that holds the
same model still differs from it a little, since llama.cpp rounds on its way: what goes into a quantized matrix to 8
bits per number with a scale for every 32 (or 256), what goes into one in F16 to that, and keys and values to F16. And
the folder holds weights rounded to the type of the original, the file the blocks themselves. How much that makes
depends on the model and hardly on the types: of SmolLM2-135M 2e-3 nats per token in Q4_0 as in Q8_0 (on other text up
to 6e-3, of which rounded activations are four fifths), and 2e-6 in F16. What would be an error of the file (rows in
another order, a lost scale, another embedding) moves the distribution by far more.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from evopress.artifacts.atomic import scratch_folder
from evopress.artifacts.exports import model_folder, read_export_manifest
from evopress.artifacts.model_facts import read_model_facts
from evopress.artifacts.paths import DENSE, GGUF, Run
from evopress.artifacts.provenance import Provenance, read_model_fingerprint, require_same_model
from evopress.artifacts.tables import RUNTIME, read_provenance, write_table
from evopress.config.context import StageContext
from evopress.config.evaluation import RuntimeSettings
from evopress.data.tokens import read_counted, read_tokens
from evopress.evaluation.llama_cpp import logits, resident_bytes, runtime_version, speeds
from evopress.evaluation.perplexity import RUN_TOKENS, predicted
from evopress.export.gguf.file import write_gguf
from evopress.models.blockwise import BlockwiseModel, final_hidden
from evopress.models.verify import check_model
from evopress.util.errors import ModelError
from evopress.util.metrics import kl_per_token, nll_per_token
from evopress.util.progress import log, progress


@dataclass(frozen=True)
class Text:
    """Sequences on which the runtime is compared."""

    dataset: str
    tokens: torch.Tensor
    """[S, L] int64."""
    predicts: torch.Tensor
    """[S, L] bool: positions that count (`perplexity.predicted`)."""


def evaluate_runtime(context: StageContext, search: str, datasets: Sequence[str], settings: RuntimeSettings) -> None:
    """Run the GGUF file of ``search`` in llama.cpp, or the dense model's in F16, and write its RUNTIME table.

    Speed is told beside that of the dense model's F16 file, which is written for the time of the measurement and takes
    turns with the other. Both depend on the machine and on what else it does.

    Raises:
        ConfigError: llama.cpp is not installed.
        ArtifactError: the model, its file or tokens are missing, damaged or of another model.
        ModelError: llama.cpp does not run the file, or computes something else than this package.
        UnsupportedArchitectureError: llama.cpp has no code for the dense model.
    """
    run = context.run
    check_model(run)
    texts = [_read(run, dataset, settings.tokens) for dataset in datasets]
    threads = context.compute.threads or psutil.cpu_count(logical=False) or 1
    with _f16_file(run, search) as dense:
        file = dense if search == DENSE else exported_file(run, search)
        rows = []
        for row in _comparisons(context, search, file, texts, threads):
            require_close(file, row["dataset"], row["kl"], settings.largest_kl)
            rows.append(row)
        facts = {
            "search": search,
            "largest_kl": settings.largest_kl,
            "file_bytes": file.stat().st_size,
            "sha256": "" if search == DENSE else file_digest(run, search),
            **_costs(file, dense, texts[0].tokens.flatten()[: settings.prompt].tolist(), settings, threads),
            "threads": threads,
            "runtime": runtime_version(),
        }
    about = json.dumps({"datasets": list(datasets), **settings.model_dump()})
    provenance = Provenance("evaluation", about, read_model_fingerprint(run))
    table = pd.DataFrame([{**facts, **row} for row in rows], columns=RUNTIME.names)
    write_table(table, run.runtime(search), RUNTIME, provenance)


def require_close(file: Path, dataset: str, kl: float, largest: float) -> None:
    """Check that the runtime computes what was judged, as far as its rounding lets it.

    Raises:
        ModelError: it does not.
    """
    log.info("%s: KL %.2g from this package on %s", file, kl, dataset)
    if not kl <= largest:  # NaN, too
        raise ModelError(
            f"{file}: its distribution on {dataset} in llama.cpp is {kl:.3g} nats per token from that of the model "
            f"that was judged, more than evaluation.runtime.largest_kl ({largest:g}): it holds another model, or "
            "llama.cpp computes this one otherwise; do not publish it. Raise the limit only if rounding alone makes so "
            "much of a difference"
        )


def exported_file(run: Run, search: str) -> Path:
    """The GGUF file of a search, after checking it against its manifest.

    Raises:
        ArtifactError: it is missing, damaged or of another model.
    """
    name = _file_name(read_export_manifest(run, search, GGUF))
    return run.export(search, GGUF) / name


def file_digest(run: Run, search: str) -> str:
    """sha256 of the GGUF file of a search, as its manifest has it."""
    manifest = read_export_manifest(run, search, GGUF)
    return str(manifest["files"][_file_name(manifest)]["sha256"])


def _file_name(manifest: dict[str, Any]) -> str:
    return next(name for name in manifest["files"] if name.endswith(".gguf"))


def _read(run: Run, dataset: str, tokens: int) -> Text:
    """The first sequences of a text, of so many tokens together."""
    require_same_model(run, read_provenance(run.tokens(dataset)), run.tokens(dataset))
    read, counted = read_tokens(run, dataset), read_counted(run, dataset)
    count = max(1, tokens // read.shape[1])
    return Text(dataset, read[:count], predicted(counted[:count]))


@contextmanager
def _f16_file(run: Run, search: str) -> Iterator[Path]:
    """The dense model with its matrices in F16, for as long as it is needed."""
    with scratch_folder(run.runtime(search)) as folder:
        path, facts = folder / "f16.gguf", read_model_facts(run)
        write_gguf(run.model, path, {}, name=f"{facts.name} F16", card=facts.card, dense=GGMLQuantizationType.F16)
        yield path


def _costs(
    file: Path, dense: Path, prompt: Sequence[int], settings: RuntimeSettings, threads: int
) -> dict[str, float | int]:
    """Memory and speed of a file; ratios are those of one repetition, of which the median is taken."""
    paths, taken = [dense] if file == dense else [file, dense], []
    with progress(f"speed of {file.name}", settings.repetitions, "repetitions") as bar:
        for repetition in speeds(paths, prompt, settings.generated, settings.repetitions, threads):
            taken.append(repetition)
            bar.advance()
    per_second = [len(prompt), settings.generated] / np.array(taken)  # [repetitions, files, prompt and generation]
    speed = np.median(per_second[:, 0], axis=0)
    ratio = np.median(per_second[:, 0] / per_second[:, -1], axis=0)
    return {
        "resident_bytes": resident_bytes(file, prompt, settings.generated, threads),
        "prompt_speed": float(speed[0]),
        "generation_speed": float(speed[1]),
        "prompt_ratio": float(ratio[0]),
        "generation_ratio": float(ratio[1]),
    }


def _comparisons(
    context: StageContext, search: str, file: Path, texts: Sequence[Text], threads: int
) -> Iterator[dict[str, Any]]:
    """The columns of the RUNTIME table that hang on a text."""
    model = BlockwiseModel.from_folder(
        model_folder(context.run, search),
        context.device,
        torch.float32,
        resident=False,
        trust_remote_code=context.trust_remote_code,
    )
    for text in texts:
        hidden = final_hidden(model, text.tokens, RUN_TOKENS, f"{search} on {text.dataset}")
        found = logits(file, text.tokens.tolist(), threads)
        with progress(f"{search} on {text.dataset} in llama.cpp", text.tokens.numel(), "tokens") as bar:
            kl, own, theirs = compare(model, hidden, text, _counted(found, bar.advance))
        yield {
            "dataset": text.dataset,
            "tokens": int(text.predicts.sum()),
            "kl": kl,
            "perplexity": float(np.exp(theirs)),
            "own_perplexity": float(np.exp(own)),
        }


def _counted(pieces: Iterator[NDArray[np.float32]], advance: Any) -> Iterator[torch.Tensor]:
    for piece in pieces:
        yield torch.from_numpy(piece)
        advance(len(piece))


@torch.inference_mode()
def compare(
    model: BlockwiseModel, hidden: torch.Tensor, text: Text, runtime: Iterator[torch.Tensor]
) -> tuple[float, float, float]:
    """Means over predicted tokens, in nats: KL(model || runtime), and the negative log-likelihood of each.

    Args:
        model: gives logits from hidden states.
        hidden: [S, L, H] final hidden states of it.
        text: what both have read.
        runtime: logits of all positions, in pieces [T, V].
    """
    targets, keep, hidden = text.tokens.roll(-1, dims=1).flatten(), text.predicts.flatten(), hidden.flatten(0, 1)
    sums, start = np.zeros(3), 0
    for piece in runtime:
        part = slice(start, start + len(piece))
        start += len(piece)
        kept = keep[part]
        own = model.logits(hidden[part][kept].unsqueeze(0).to(model.device))[0]
        if own.shape[1] != piece.shape[1]:
            raise ModelError(
                f"llama.cpp gives {piece.shape[1]} logits per token and the model {own.shape[1]}; export it again"
            )
        theirs, wanted = piece[kept].to(model.device), targets[part][kept].to(model.device)
        terms = kl_per_token(own, theirs), nll_per_token(own, wanted), nll_per_token(theirs, wanted)
        sums += [term.double().sum().item() for term in terms]
    kl, own_nll, their_nll = sums / max(1, int(keep.sum()))
    return float(kl), float(own_nll), float(their_nll)
