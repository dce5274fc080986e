"""How much each block changes the hidden states that pass it: importance scores for depth pruning.

All compare the hidden states x before a block with those after it, y, token by token, in the dense model. The less a
block changes them, the less it is taken to matter.
"""

from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from evopress.config.context import StageContext
from evopress.models.blockwise import BlockwiseModel
from evopress.search.engine.evaluator import require_tokens, search_text
from evopress.search.engine.memory import plan_memory
from evopress.search.evaluation import draw_minibatch
from evopress.util.progress import progress, stop_on_sigterm

Score = Callable[[Tensor, Tensor], Tensor]
"""(x [T, H], y [T, H]), both float32 -> [T]."""


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Block influence of ShortGPT (arXiv 2403.03853): 1 - cos(x, y)."""
    return 1 - cosine_similarity(x, y, dim=-1)


def angle(x: Tensor, y: Tensor) -> Tensor:
    """Angular distance, arccos(cos(x, y)) / pi.

    Of "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887); there for the last token of each
    sequence, here for all.
    """
    return cosine_similarity(x, y, dim=-1).clamp(-1, 1).acos() / torch.pi


def norm_ratio(x: Tensor, y: Tensor) -> Tensor:
    """What the block adds, relative to what leaves it: |y - x| / |y|.

    The criterion of weight subcloning (arXiv 2312.09299), in the form in which public code for depth pruning has it.
    """
    return l2(x, y) / y.norm(dim=-1)


def l2(x: Tensor, y: Tensor) -> Tensor:
    """|y - x|."""
    return (y - x).norm(dim=-1)


def normalized_l2(x: Tensor, y: Tensor) -> Tensor:
    """|y - x| / |x|: as a share of what enters the block."""
    return l2(x, y) / x.norm(dim=-1)


def l2_normalized(x: Tensor, y: Tensor) -> Tensor:
    """Distance of the unit vectors, |y / |y| - x / |x||, as in the code of EvoPress."""
    return l2(normalize(x, dim=-1), normalize(y, dim=-1))


SCORES: dict[str, Score] = {
    "cosine": cosine,
    "window_cosine": angle,
    "window_mean_cosine": cosine,
    "norm_ratio": norm_ratio,
    "l2": l2,
    "l2_normalized": l2_normalized,
    "normalized_l2": normalized_l2,
}
"""By name in the settings. Of windows, `window_cosine` averages angles and `window_mean_cosine` cosines."""


def score_of_text(
    context: StageContext, score: str, window: int, tokens: int, rng: np.random.Generator, where: str
) -> NDArray[np.float64]:
    """Scores (`block_scores`) of the dense model on ``tokens`` random tokens of the search text.

    Raises:
        ConfigError: the search text or the memory is too little; the message begins with ``where``.
        ArtifactError: the model or the tokens are missing, damaged or of another model.
    """
    text = search_text(context.run)
    require_tokens({"tokens": tokens}, text.numel(), where)
    drawn = draw_minibatch(tokens, len(text), text.shape[1], rng)
    model = BlockwiseModel.from_folder(
        context.run.model,
        context.device,
        resident=False,
        quick=True,
        trust_remote_code=context.trust_remote_code,
    )
    run_tokens = plan_memory(context.memory_gb, model, text.shape[1]).run_tokens
    total = 0.0
    values = np.zeros(len(model.blocks) - window + 1)
    with stop_on_sigterm() as check:
        for start, end, length in drawn.segments():
            ids = text[torch.tensor(drawn.sequences[start:end])][:, :length]
            values += block_scores(model, ids, SCORES[score], window, run_tokens, check) * ids.numel()
            total += ids.numel()
    return values / total


@torch.inference_mode()
def block_scores(
    model: BlockwiseModel,
    tokens: Tensor,
    score: Score,
    window: int,
    run_tokens: int,
    check: Callable[[], None] = lambda: None,
) -> NDArray[np.float64]:
    """Mean score, over all tokens, of each window of consecutive blocks in the dense model.

    Args:
        model: opened with ``resident=False``; each block is loaded once and unloaded.
        tokens: [S, L] int64.
        score: compares the states before a window with those after it.
        window: blocks in a window.
        run_tokens: tokens that pass a block at once (at least one sequence).
        check: called between runs; raises if the work should stop.

    Returns:
        [blocks - window + 1], by the first block of the window.
    """
    rows = max(1, run_tokens // tokens.shape[1])
    inputs = model.embed(tokens[:1])[1]
    hidden = torch.cat([model.embed(batch)[0].cpu() for batch in tokens.split(rows)])
    before: deque[Tensor] = deque([hidden], maxlen=window)  # states before the last blocks, the oldest first
    scores = []
    with progress("block scores", len(model.blocks), "blocks") as bar:
        for block in range(len(model.blocks)):
            model.load_block(block)
            after = torch.empty_like(hidden)
            total = 0.0
            for start in range(0, len(tokens), rows):
                check()
                part = slice(start, start + rows)
                after[part] = model.run_block(block, before[-1][part].to(model.device), inputs)
                if len(before) == window:
                    x, y = (states[part].to(model.device).float().flatten(0, 1) for states in (before[0], after))
                    total += float(score(x, y).sum(dtype=torch.float64))
            if len(before) == window:
                scores.append(total / tokens.numel())
            before.append(after)
            model.unload_block(block)
            bar.advance()
    return np.array(scores)
