"""The dense model's final hidden states, kept so that every compressed model is compared with the same teacher."""

import torch

from evopress.artifacts.manifest import sha256
from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import Provenance
from evopress.artifacts.tensors import read_manifest, read_tensors, write_tensors
from evopress.util.errors import ArtifactError


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
