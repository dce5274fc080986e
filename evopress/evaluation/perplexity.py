"""Perplexity of a model, and its divergence from the dense one, on held-out text."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from evopress.artifacts.exports import model_folder
from evopress.artifacts.paths import DENSE, Run
from evopress.artifacts.provenance import Provenance, read_model_fingerprint, require_same_model
from evopress.artifacts.tables import PERPLEXITY, read_provenance, write_table
from evopress.config.context import StageContext
from evopress.data.tokens import read_counted, read_tokens
from evopress.evaluation.hidden import read_dense_hidden, write_dense_hidden
from evopress.models.blockwise import BlockwiseModel
from evopress.models.propagation import final_hidden
from evopress.models.verify import check_model
from evopress.util.errors import ModelError
from evopress.util.metrics import kl_per_token, nll_per_token

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
    nll, kl = mean_nll_and_kl(model, hidden, tokens, predicts, teacher, dense)
    if math.isnan(nll) or math.isnan(kl):
        raise ModelError(f"{model.checkpoint.folder}: gives NaN on {dataset}; check its weights")
    if search == DENSE:
        write_dense_hidden(run, dataset, hidden, provenance)
    count = int(predicts.sum())
    return {"search": search, "dataset": dataset, "perplexity": float(np.exp(nll)), "kl": kl, "tokens": count}


def predicted(counted: torch.Tensor) -> torch.Tensor:
    """Positions that predict a token of their own window, bool [S, L]: of those that count, all but the last."""
    predicts = counted.clone()
    predicts[:, -1] = False  # it predicts what lies outside
    return predicts


@torch.inference_mode()
def mean_nll_and_kl(
    model: BlockwiseModel,
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    predicts: torch.Tensor,
    teacher: torch.Tensor | None,
    dense: BlockwiseModel | None = None,
) -> tuple[float, float]:
    """Mean negative log-likelihood and mean KL(teacher || model), in nats, over the predicted tokens.

    Each window is scored on its own: tokens 1 to L-1 are predicted, each from those before it, start tokens apart.
    Each model's logits come from its own final norm and head, which may be compressed, too.

    Args:
        model: gives logits from hidden states.
        hidden: [S, L, H] final hidden states.
        tokens: [S, L] int64.
        predicts: [S, L] bool, the positions that are scored (`predicted`).
        teacher: [S, L, H] final hidden states of the dense model; None measures no divergence (it is 0).
        dense: gives logits from those; None where ``model`` has the same norm and head.
    """
    targets = tokens.roll(-1, dims=1).flatten()
    keep = predicts.flatten()
    nll = kl = 0.0
    for rows in torch.arange(len(targets)).split(max(1, LOGITS // model.vocab_size)):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        kept = keep[part].to(model.device)
        logits = _logits(model, hidden, part)
        nll += nll_per_token(logits, targets[part].to(model.device))[kept].double().sum().item()
        if teacher is not None:
            kl += kl_per_token(_logits(dense or model, teacher, part), logits)[kept].double().sum().item()
    count = int(keep.sum())
    return nll / count, kl / count


def _logits(model: BlockwiseModel, hidden: torch.Tensor, part: slice) -> torch.Tensor:
    """Logits [T, V] of a slice of all positions; each position stands alone, so windows may be cut anywhere."""
    return model.logits(hidden.flatten(0, 1)[part].unsqueeze(0).to(model.device, model.dtype))[0]
