"""How work is divided among processes, against trying every division."""

import itertools

import numpy as np
import pytest

from evopress.search.engine.forward import Share, new_blocks, partition, plan_block, run_costs, share_out

BLOCKS = 4
BLOCK_OF = np.repeat(np.arange(BLOCKS), 2)


def random_candidates(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.unique(rng.integers(0, 2, (count, 2 * BLOCKS)).astype(np.int16), axis=0)


def blocks_run(candidates: np.ndarray) -> int:
    """Blocks x distinct states, as the engine runs them."""
    state_of, total = np.zeros(len(candidates), dtype=np.int64), 0
    for block in range(BLOCKS):
        plan = plan_block(state_of, candidates[:, block == BLOCK_OF])
        state_of, total = plan.state_of, total + len(plan.parents)
    return total


@pytest.mark.parametrize("seed", range(4))
def test_the_estimate_is_what_the_engine_runs(seed):
    candidates = random_candidates(12, seed)
    assert new_blocks(candidates, BLOCK_OF, BLOCKS).sum() == blocks_run(candidates)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_no_other_division_into_runs_is_better(seed, n):
    candidates, head = random_candidates(9, seed), 0.7
    new = new_blocks(candidates, BLOCK_OF, BLOCKS)

    def dearest(parts) -> float:
        used = [part for part in parts if part.stop > part.start]
        return max(blocks_run(candidates[part]) + head * (part.stop - part.start + 1) for part in used)

    parts = partition(run_costs(new, BLOCKS, head), n)
    assert len(parts) == n and [i for part in parts for i in range(len(new))[part]] == list(range(len(new)))
    every = [
        [slice(a, b) for a, b in itertools.pairwise([0, *cuts, len(new)])]
        for cuts in itertools.combinations_with_replacement(range(len(new) + 1), n - 1)
    ]
    assert dearest(parts) == pytest.approx(min(map(dearest, every)))


@pytest.mark.parametrize(
    ("count", "lengths", "n"),
    [(1, (8,), 3), (2, (8, 8, 8, 3), 2), (12, (5,), 4), (3, (8,) * 9, 4), (5, (8, 1), 2), (4, (8, 8), 7)],
)
def test_every_candidate_is_judged_on_every_sequence_exactly_once(count, lengths, n):
    candidates = random_candidates(count, 1)
    shares = share_out(candidates, BLOCK_OF, BLOCKS, 1.0, lengths, n)
    judged = np.zeros((len(candidates), len(lengths)), dtype=int)
    for share in shares:
        judged[share.candidates, share.sequences] += 1
    assert len(shares) == n and (judged == 1).all()


def test_few_candidates_on_many_sequences_are_divided_by_sequences():
    shares = share_out(random_candidates(3, 0), BLOCK_OF, BLOCKS, 1.0, (8,) * 16, 4)
    assert shares == [Share(slice(0, 3), slice(4 * rank, 4 * rank + 4)) for rank in range(4)]
    alone = share_out(random_candidates(12, 0), BLOCK_OF, BLOCKS, 1.0, (8,), 2)
    assert all(share.sequences == slice(0, 1) and share.candidates.stop - share.candidates.start > 1 for share in alone)
