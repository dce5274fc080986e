"""SparseGPT's one sweep against a plain oracle: one level, one layer, one column at a time, in float64."""

import pytest
import torch
from torch import Tensor

from evopress.compression.pruning import lowest, ranks
from evopress.compression.sparsegpt import inverse_factor, sparsegpt
from evopress.compression.sparsity import SparsityLevel, pattern_levels, unstructured_levels
from evopress.util.errors import CompressionError

ROWS, COLUMNS = 12, 40


def correlated_inputs(tokens: int, columns: int = COLUMNS, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    return torch.randn(tokens, columns, generator=generator) @ (torch.eye(columns) + 0.3 * mixing)


def layer_weights(layers: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(layers, ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)).to(dtype)


def hessian_of(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs


def levels_at(sparsity: float = 0.5, step: int = 48, each_way: int = 2) -> list[SparsityLevel]:
    return unstructured_levels(ROWS * COLUMNS, sparsity, step, each_way)


def shares_by_score(scores: Tensor, removed: int, block: int) -> list[int]:
    """How many of the lowest scores [rows, columns] lie in each block of columns."""
    lowest_columns = scores.T.flatten().argsort()[:removed] // len(scores)
    return torch.bincount(lowest_columns // block, minlength=-(-scores.shape[1] // block)).tolist()


def oracle(
    weight: Tensor, hessian: Tensor, level: SparsityLevel, damping: float, block: int, even: bool = True
) -> Tensor:
    """The paper's algorithm 1 as it is written: the inverse Hessian, its Cholesky factor, a column at a time."""
    damped = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    scales = upper.diagonal()
    w = weight.double().clone()
    mask = torch.ones_like(w, dtype=torch.bool)
    columns = w.shape[1]
    width = level.pattern[1] if level.pattern else block
    shares = shares_by_score(w.abs() / scales, level.removed, block)
    for j in range(columns):
        if j % width == 0:
            stop = min(j + width, columns)
            saliency = (w[:, j:stop] / scales[j:stop]) ** 2
            if level.pattern:
                drop = saliency.topk(level.pattern[1] - level.pattern[0], largest=False).indices
                mask[:, j:stop].scatter_(1, drop, False)
            else:
                count = level.removed * stop // columns - level.removed * j // columns if even else shares[j // block]
                flat = torch.ones(saliency.numel(), dtype=torch.bool)
                flat[saliency.flatten().argsort()[:count]] = False
                mask[:, j:stop] = flat.view_as(saliency)
        error = w[:, j] * ~mask[:, j] / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:]
        w[:, j] *= mask[:, j]
    return w


def error_of(weight: Tensor, pruned: Tensor, hessian: Tensor) -> float:
    difference = (weight - pruned).double()
    return float((difference @ hessian.double() @ difference.T).trace())


def magnitude(weight: Tensor, removed: int) -> Tensor:
    kept = weight.clone().flatten()
    kept[kept.abs().argsort()[:removed]] = 0
    return kept.view_as(weight)


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("block", [1, 7, 16, 30, 128])
def test_one_sweep_equals_the_algorithm_level_by_level(block: int, even: bool) -> None:
    weights, hessian = layer_weights(2), hessian_of(correlated_inputs(400))
    levels = levels_at()
    pruned = sparsegpt(weights, inverse_factor(hessian, 0.01), levels, block, even)
    for index, level in enumerate(levels):
        for layer in range(2):
            expected = oracle(weights[layer], hessian, level, 0.01, block, even)
            torch.testing.assert_close(pruned.weights[index, layer].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patterns", [["2:4"], ["4:8"], ["1:4", "2:4", "3:4"]])
def test_patterns_equal_the_algorithm_and_hold_in_every_group(patterns: list[str]) -> None:
    weights, hessian = layer_weights(2), hessian_of(correlated_inputs(400))
    levels = pattern_levels(ROWS * COLUMNS, COLUMNS, patterns)
    pruned = sparsegpt(weights, inverse_factor(hessian, 0.01), levels, 24)
    for index, level in enumerate(levels):
        keep, of = level.pattern
        groups = pruned.kept[index].view(2, ROWS, -1, of).sum(-1)
        assert (groups == keep).all()
        for layer in range(2):
            expected = oracle(weights[layer], hessian, level, 0.01, 24)
            torch.testing.assert_close(pruned.weights[index, layer].double(), expected, rtol=1e-4, atol=1e-5)


def test_shares_by_score_beat_even_ones() -> None:
    inputs = correlated_inputs(400) * torch.linspace(0.3, 3, COLUMNS)
    weights, factor = layer_weights(2), inverse_factor(hessian_of(inputs), 0.01)
    even, by_score = (sparsegpt(weights, factor, levels_at(), 8, choice).errors for choice in (True, False))
    assert (by_score < 0.9 * even).all()


def test_each_level_removes_exactly_its_count_from_each_layer() -> None:
    weights, hessian = layer_weights(3), hessian_of(correlated_inputs(400))
    weights[1] *= 100  # a shared threshold would take nearly everything from the other layers
    weights[2] = weights[2].sign()  # full of ties
    levels = unstructured_levels(ROWS * COLUMNS, 0.47, 31, 6)
    assert len(levels) == 13
    pruned = sparsegpt(weights, inverse_factor(hessian, 0.01), levels, 16)
    for index, level in enumerate(levels):
        assert (~pruned.kept[index]).sum((1, 2)).tolist() == [level.removed] * 3
        assert not pruned.weights[index][~pruned.kept[index]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_those_of_the_stored_weights(dtype: torch.dtype) -> None:
    weights, hessian = layer_weights(2, dtype), hessian_of(correlated_inputs(400))
    pruned = sparsegpt(weights, inverse_factor(hessian, 0.01), levels_at(), 16)
    assert pruned.weights.dtype == dtype
    expected = [[error_of(weights[i], level[i], hessian) for i in range(2)] for level in pruned.weights]
    torch.testing.assert_close(pruned.errors, torch.tensor(expected, dtype=torch.float64), rtol=1e-3, atol=1e-3)
    assert (pruned.errors.diff(dim=0) > 0).all()


def test_beats_magnitude_on_the_output_error() -> None:
    weights, hessian = layer_weights(), hessian_of(correlated_inputs(400))
    levels = levels_at()
    pruned = sparsegpt(weights, inverse_factor(hessian, 0.01), levels, 16)
    for index, level in enumerate(levels):
        by_magnitude = error_of(weights[0], magnitude(weights[0], level.removed), hessian)
        assert float(pruned.errors[index, 0]) < 0.8 * by_magnitude


def test_dead_inputs_go_first_and_change_nothing_else() -> None:
    inputs = correlated_inputs(400)
    inputs[:, [3, 17]] = 0
    weights, hessian = layer_weights(), hessian_of(inputs)
    levels = levels_at()
    pruned = sparsegpt(weights, inverse_factor(hessian, 0.01), levels, 20)
    assert not pruned.weights[..., [3, 17]].any()
    assert torch.isfinite(pruned.weights).all()
    assert (~pruned.kept).sum((2, 3))[:, 0].tolist() == [level.removed for level in levels]
    assert not pruned.kept[..., [3, 17]].any()
    expected = torch.tensor([[error_of(weights[0], level[0], hessian)] for level in pruned.weights])
    torch.testing.assert_close(pruned.errors.float(), expected, rtol=1e-4, atol=1e-3)


def test_fewer_tokens_than_inputs_still_beat_magnitude() -> None:
    weights, hessian = layer_weights(), hessian_of(correlated_inputs(COLUMNS // 4))
    factor = inverse_factor(hessian, 0.01)
    level = levels_at(each_way=0)[0]
    pruned = sparsegpt(weights, factor, [level], 16)
    assert torch.isfinite(pruned.weights).all()
    assert float(pruned.errors) < 0.5 * error_of(weights[0], magnitude(weights[0], level.removed), hessian)


def test_damping_is_raised_until_cholesky_succeeds() -> None:
    hessian = hessian_of(correlated_inputs(400))
    hessian -= 0.3 * hessian.diagonal().mean() * torch.eye(COLUMNS)  # no longer positive definite
    factor = inverse_factor(hessian, 0.01)
    assert factor.damping > 0.01
    assert torch.isfinite(sparsegpt(layer_weights(), factor, levels_at(), 16).weights).all()


def test_a_hessian_beyond_any_damping_is_an_error() -> None:
    with pytest.raises(CompressionError, match="Cholesky"):
        inverse_factor(torch.eye(COLUMNS) + 100 * (torch.ones(COLUMNS, COLUMNS) - torch.eye(COLUMNS)), 0.01)


def test_weights_that_leave_their_type_are_an_error() -> None:
    weights = layer_weights(dtype=torch.float16) * 3e4
    inputs = correlated_inputs(400) @ torch.ones(COLUMNS, COLUMNS) + correlated_inputs(400, seed=2)
    with pytest.raises(CompressionError, match="float16"):
        sparsegpt(weights.clamp(-6e4, 6e4), inverse_factor(hessian_of(inputs), 0.01), levels_at(0.9, 1, 0), 16)


def test_lowest_marks_exact_counts_with_the_first_of_ties() -> None:
    scores = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0])
    assert lowest(scores, 3).int().tolist() == [0, 1, 1, 0, 1]
    assert lowest(scores, 0).int().tolist() == [0] * 5
    assert lowest(scores, 5).int().tolist() == [1] * 5


def test_ranks_order_ties_by_position() -> None:
    assert ranks(torch.tensor([[2.0, 1.0, 2.0, 0.0]]), 1).tolist() == [[2, 1, 3, 0]]


def test_a_level_that_removes_nothing_keeps_the_weights() -> None:
    weights, hessian = layer_weights(), hessian_of(correlated_inputs(400))
    pruned = sparsegpt(weights, inverse_factor(hessian, 0.01), [SparsityLevel("-1", 0)], 16)
    assert pruned.kept.all()
    assert torch.equal(pruned.weights[0], weights)
