"""Perplexity of a model, its divergence from the dense one, and how often both agree, on held-out text."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from evopress.artifacts.exports import model_folder
from evopress.artifacts.manifest import sha256
from evopress.artifacts.paths import DENSE, Run
from evopress.artifacts.provenance import Provenance, read_model_fingerprint, require_same_model
from evopress.artifacts.tables import PERPLEXITY, read_provenance, write_table
from evopress.artifacts.tensors import read_manifest, read_tensors, write_tensors
from evopress.config.context import StageContext
from evopress.data.tokens import read_counted, read_tokens
from evopress.models.blockwise import BlockwiseModel, final_hidden
from evopress.models.verify import check_model
from evopress.util.errors import ArtifactError, ModelError
from evopress.util.metrics import error_of_mean, kl_per_token, nll_per_token

# The dense model's final hidden states, kept so that every compressed model is compared with the same teacher.


def write_dense_hidden(run: Run, dataset: str, hidden: torch.Tensor, provenance: Provenance) -> None:
    """Keep the dense model's final hidden states [S, L, H], with the digest of the tokens they belong to.

    Raises:
        ArtifactError: the file cannot be written.
    """
    facts = {"dataset": dataset, "tokens_sha256": sha256(run.tokens(dataset))}
    write_tensors({"hidden": hidden}, run.dense_hidden(dataset), provenance, facts)


def read_dense_hidden(run: Run, dataset: str, provenance: Provenance) -> torch.Tensor:
    """Final hidden states [S, L, H] of the dense model.

    Raises:
        ArtifactError: missing, damaged, made by another model or from other tokens.
    """
    path = run.dense_hidden(dataset)
    manifest = read_manifest(path)
    same_model = manifest["provenance"].get("model") == provenance.model
    if not same_model or manifest.get("facts", {}).get("tokens_sha256") != sha256(run.tokens(dataset)):
        what = "from other tokens" if same_model else "by another model"
        raise ArtifactError(f"{path}: was made {what} than those in {run.root}; delete it and run again")
    return read_tensors(path)["hidden"]


RUN_TOKENS = 8192
"""Tokens that go through a block at once."""
LOGITS = 1 << 25
"""Numbers (tokens x vocabulary) of logits that are made at once: 64 MB in bfloat16."""


def evaluate_perplexity(context: StageContext, search: str, datasets: Sequence[str]) -> None:
    """Measure the exported model of ``search``, or the dense one, and write its PERPLEXITY table.

    ``dense`` also writes its final hidden states, from which every other model's divergence is measured; so it
    comes first.

    Raises:
        ArtifactError: the model, its tokens or the dense hidden states are missing, damaged or of another model.
        ModelError: the model gives NaN.
    """
    run = context.run
    if search == DENSE:
        check_model(run)
    table = measure_folder(context, model_folder(run, search), search, datasets)
    write_table(table, run.perplexity(search), PERPLEXITY, _provenance(run, datasets))


def measure_folder(context: StageContext, folder: Path, name: str, datasets: Sequence[str]) -> pd.DataFrame:
    """Measure a model in any folder against the dense one; columns of PERPLEXITY.

    Args:
        context: of the run that has the dense model and the text.
        folder: of the model, which has the tokens of the dense one.
        name: what the table calls it.
        datasets: names of evaluation sets.

    Raises:
        ArtifactError: tokens or the dense hidden states are missing, damaged or of another model.
        ModelError: the model gives NaN.
    """
    run, provenance = context.run, _provenance(context.run, datasets)
    model = _open(context, folder)
    dense = model if folder == run.model else _open(context, run.model)
    rows = [_measure(run, name, dataset, model, dense, provenance) for dataset in datasets]
    return pd.DataFrame(rows, columns=PERPLEXITY.names)


def _provenance(run: Run, datasets: Sequence[str]) -> Provenance:
    return Provenance("evaluation", json.dumps({"datasets": list(datasets)}), read_model_fingerprint(run))


def _open(context: StageContext, folder: Path) -> BlockwiseModel:
    return BlockwiseModel.from_folder(
        folder, context.device, resident=False, quick=True, trust_remote_code=context.trust_remote_code
    )


def _measure(
    run: Run, search: str, dataset: str, model: BlockwiseModel, dense: BlockwiseModel, provenance: Provenance
) -> dict[str, str | float | int]:
    """One row of the PERPLEXITY table."""
    require_same_model(run, read_provenance(run.tokens(dataset)), run.tokens(dataset))
    tokens = read_tokens(run, dataset)
    teacher = None if search == DENSE else read_dense_hidden(run, dataset, provenance)
    hidden = final_hidden(model, tokens, RUN_TOKENS, f"{search} on {dataset}")
    predicts = predicted(read_counted(run, dataset))
    scores = score(model, hidden, tokens, predicts, teacher, dense)
    if math.isnan(scores.perplexity) or math.isnan(scores.kl):
        raise ModelError(f"{model.checkpoint.folder}: gives NaN on {dataset}; check its weights")
    if search == DENSE:
        write_dense_hidden(run, dataset, hidden, provenance)
    return {"search": search, "dataset": dataset, **asdict(scores), "tokens": int(predicts.sum())}


def predicted(counted: torch.Tensor) -> torch.Tensor:
    """Positions that predict a token of their own window, bool [S, L]: of those that count, all but the last."""
    predicts = counted.clone()
    predicts[:, -1] = False  # it predicts what lies outside
    return predicts


@dataclass(frozen=True)
class Scores:
    """Means over the predicted tokens of a text, with standard errors over its sequences."""

    perplexity: float
    kl: float
    """KL(teacher || model), nats per token."""
    kl_stderr: float
    agreement: float
    """Share of tokens at which the model's most likely token is the teacher's; of equal logits, the first counts."""
    agreement_stderr: float


@torch.inference_mode()
def score(
    model: BlockwiseModel,
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    predicts: torch.Tensor,
    teacher: torch.Tensor | None,
    dense: BlockwiseModel | None = None,
) -> Scores:
    """Compare a model with the text and with the teacher.

    Each window is scored on its own: tokens 1 to L-1 are predicted, each from those before it, start tokens apart.
    Each model's logits come from its own final norm and head, which may be compressed, too.

    Args:
        model: gives logits from hidden states.
        hidden: [S, L, H] final hidden states.
        tokens: [S, L] int64.
        predicts: [S, L] bool, the positions that are scored (`predicted`).
        teacher: [S, L, H] final hidden states of the dense model; None where the model is the dense one, which
            agrees with itself.
        dense: gives logits from those; None where ``model`` has the same norm and head.
    """
    length, keep, targets = tokens.shape[1], predicts.flatten(), tokens.roll(-1, dims=1).flatten()
    sums = torch.zeros((3, len(tokens)), dtype=torch.float64)  # of nll, KL and agreement, by sequence
    for rows in torch.arange(len(targets)).split(max(1, LOGITS // model.vocab_size)):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        kept, logits = keep[part].to(model.device), _logits(model, hidden, part)
        found = [nll_per_token(logits, targets[part].to(model.device))]
        if teacher is not None:
            theirs = _logits(dense or model, teacher, part)
            found += [kl_per_token(theirs, logits), (logits.argmax(-1) == theirs.argmax(-1)).float()]
        scores = torch.stack(found)[:, kept].double().cpu()
        sums[: len(found)].index_add_(1, rows[kept.cpu()] // length, scores)
    return _scores(sums.numpy(), predicts.sum(1).numpy(), itself=teacher is None)


def _scores(sums: NDArray[np.float64], counts: NDArray[np.int64], *, itself: bool) -> Scores:
    """From sums [3, S] over the ``counts`` [S] predicted tokens of each sequence; ``itself`` is the teacher."""
    nll, kl, agreement = (sums.sum(1) / counts.sum()).tolist()
    if itself:
        return Scores(float(np.exp(nll)), 0.0, math.nan, 1.0, math.nan)
    errors = [error_of_mean(each / np.maximum(counts, 1), counts) for each in sums[1:]]
    return Scores(float(np.exp(nll)), kl, errors[0], agreement, errors[1])


def _logits(model: BlockwiseModel, hidden: torch.Tensor, part: slice) -> torch.Tensor:
    """Logits [T, V] of a slice of all positions; each position stands alone, so windows may be cut anywhere."""
    return model.logits(hidden.flatten(0, 1)[part].unsqueeze(0).to(model.device, model.dtype))[0]
