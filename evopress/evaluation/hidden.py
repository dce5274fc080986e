"""Final hidden states of a model on whole data sets, with one block's weights in memory at a time."""

import torch

from evopress.artifacts.paths import Results
from evopress.artifacts.provenance import Provenance
from evopress.artifacts.tensors import read_manifest, read_tensors, sha256, write_tensors
from evopress.errors import ArtifactError
from evopress.models.blockwise import BlockwiseModel
from evopress.progress import progress

BATCH_TOKENS = 8192
"""Tokens that go through a block at once; as many sequences as that holds, and at least one."""


@torch.inference_mode()
def final_hidden(model: BlockwiseModel, tokens: torch.Tensor, description: str) -> torch.Tensor:
    """Run ``tokens`` through all blocks.

    Block by block for all sequences, so each block is loaded once and unloaded; hidden states wait in host memory.

    Args:
        model: opened with ``resident=False``, or its blocks are loaded again and then unloaded.
        tokens: [S, L] int64.
        description: what the progress bar says.

    Returns:
        [S, L, H] on the CPU, in the model's dtype: what the last block returns, before the final norm.
    """
    step = max(1, BATCH_TOKENS // tokens.shape[1])
    hidden = torch.cat([model.embed(batch)[0].cpu() for batch in tokens.split(step)])
    _, inputs = model.embed(tokens[:1])
    with progress(description, tokens.numel() * len(model.blocks), "tokens x blocks") as bar:
        for block in range(len(model.blocks)):
            model.load_block(block)
            for batch in hidden.split(step):
                batch.copy_(model.run_block(block, batch.to(model.device), inputs))
                bar.advance(batch.shape[0] * batch.shape[1])
            model.unload_block(block)
    return hidden


def write_dense_hidden(results: Results, dataset: str, hidden: torch.Tensor, provenance: Provenance) -> None:
    """Keep the dense model's final hidden states [S, L, H], with the digest of the tokens they belong to.

    Raises:
        ArtifactError: the file cannot be written.
    """
    facts = {"dataset": dataset, "tokens_sha256": sha256(results.tokens(dataset))}
    write_tensors({"hidden": hidden}, results.dense_hidden(dataset), provenance, facts)


def read_dense_hidden(results: Results, dataset: str, provenance: Provenance) -> torch.Tensor:
    """Final hidden states [S, L, H] of the dense model.

    Raises:
        ArtifactError: missing, damaged, made by another model or from other tokens.
    """
    path = results.dense_hidden(dataset)
    manifest = read_manifest(path)
    same_model = manifest["provenance"].get("model") == provenance.model
    if not same_model or manifest.get("facts", {}).get("tokens_sha256") != sha256(results.tokens(dataset)):
        what = "from other tokens" if same_model else "by another model"
        raise ArtifactError(f"{path}: was made {what} than those in {results.root}; delete it and run again")
    return read_tensors(path)["hidden"]
