"""Final hidden states of a model on many sequences, with one block's weights in memory at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from evopress.models.blockwise import BlockwiseModel
from evopress.util.progress import progress


@torch.inference_mode()
def final_hidden(
    model: BlockwiseModel, tokens: Tensor, run_tokens: int, description: str, check: Callable[[], None] = lambda: None
) -> Tensor:
    """Run ``tokens`` through all blocks, each loaded once and unloaded; hidden states wait in host memory.

    Args:
        model: opened with ``resident=False``, or its blocks are loaded again and then unloaded.
        tokens: [S, L] int64.
        run_tokens: tokens that pass a block at once; as many sequences as that holds, and at least one.
        description: what the progress bar says.
        check: called between runs; raises if the work should stop.

    Returns:
        [S, L, H] on the CPU, in the model's dtype: what the last block returns, before the final norm.
    """
    if not len(tokens):
        return torch.empty((*tokens.shape, model.hidden_size), dtype=model.dtype)
    rows = max(1, run_tokens // tokens.shape[1])
    inputs = model.embed(tokens[:1])[1]
    hidden = torch.cat([model.embed(batch)[0].cpu() for batch in tokens.split(rows)])
    with progress(description, len(model.blocks) * tokens.numel(), "block tokens") as bar:
        for block in range(len(model.blocks)):
            model.load_block(block)
            for piece in hidden.split(rows):
                check()
                piece.copy_(model.run_block(block, piece.to(model.device), inputs))
                bar.advance(piece.shape[0] * piece.shape[1])
            model.unload_block(block)
    return hidden
