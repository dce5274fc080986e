"""SparseGPT's one sweep against a plain oracle: one level, one layer, one column at a time, in float64."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from evopress.compression.formats import decode
from evopress.compression.grid import Grid, dequantize, fit_grid, highest_codes, quantize
from evopress.compression.pruning import lowest, ranks
from evopress.compression.sparsegpt import Rounding, inverse_factor, sparsegpt
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
    weight: Tensor,
    hessian: Tensor,
    level: SparsityLevel,
    damping: float,
    block: int,
    even: bool = True,
    rounding: Rounding | None = None,
) -> Tensor:
    """The paper's algorithm 1 as it is written: the inverse Hessian, its Cholesky factor, a column at a time.

    With ``rounding``, whose groups divide the blocks or are divided by them, kept weights are rounded in line 7.
    """
    damped = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    scales = upper.diagonal()
    w = weight.double().clone()
    mask = torch.ones_like(w, dtype=torch.bool)
    columns = w.shape[1]
    width = level.pattern[1] if level.pattern else block
    group = rounding.group if rounding else columns + 1
    highest = highest_codes(torch.tensor([[rounding.bits if rounding else 1]]))
    grid = Grid(torch.ones(1, len(w)), torch.zeros(1, len(w)))

    def drops(j: int, stop: int) -> Tensor:
        saliency = (w[:, j:stop] / scales[j:stop]).square().unflatten(1, (-1, width))
        order = saliency.argsort(2).argsort(2)
        return (order < width - level.pattern[0]).flatten(1)

    shares = shares_by_score(w.abs() / scales, level.removed, block)
    for j in range(columns):
        if j % width == 0:
            stop = min(j + width, columns)
            saliency = (w[:, j:stop] / scales[j:stop]) ** 2
            if level.pattern:
                mask[:, j:stop] = ~drops(j, stop)
            else:
                count = level.removed * stop // columns - level.removed * j // columns if even else shares[j // block]
                flat = torch.ones(saliency.numel(), dtype=torch.bool)
                flat[saliency.flatten().argsort()[:count]] = False
                mask[:, j:stop] = flat.view_as(saliency)
        if rounding and j % group == 0:
            known = mask[:, j : j + group].clone()
            if level.pattern:
                known = ~drops(j, j + group)
            elif group > width:
                known[:] = True
            values = (w[:, j : j + group] * known).t().float()[:, None]
            importance = scales[j : j + group].float() ** -2
            grid = fit_grid(values, highest, symmetric=False, importance=importance, clip_search=True)
        new = w[:, j] * mask[:, j]
        if rounding:
            new = dequantize(quantize(new.float()[None], grid, highest), grid)[0].double()
        error = (w[:, j] - new) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:]
        w[:, j] = new
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


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize(("block", "group"), [(8, 8), (24, 8), (8, 4), (4, 20), (1, 8), (128, 40), (10, 40), (7, 1)])
def test_rounding_in_the_same_sweep_equals_the_algorithm(block: int, group: int, even: bool) -> None:
    weights, hessian = layer_weights(2), hessian_of(correlated_inputs(400))
    levels, rounding = levels_at(each_way=1), Rounding(4, group)
    pruned = sparsegpt(weights, inverse_factor(hessian, 0.01), levels, block, even, rounding)
    for index, level in enumerate(levels):
        assert (~pruned.kept[index]).sum((1, 2)).tolist() == [level.removed] * 2
        for layer in range(2):
            expected = oracle(weights[layer], hessian, level, 0.01, block, even, rounding)
            _assert_close(pruned.weights[index, layer], expected, weights[layer], hessian)


@pytest.mark.parametrize("group", [4, 8, 20, 40])
@pytest.mark.parametrize("block", [4, 24, 128])
def test_patterns_round_as_the_algorithm_does(block: int, group: int) -> None:
    weights, hessian = layer_weights(2), hessian_of(correlated_inputs(400))
    levels, rounding = pattern_levels(ROWS * COLUMNS, COLUMNS, ["1:4", "2:4"]), Rounding(4, group)
    pruned = sparsegpt(weights, inverse_factor(hessian, 0.01), levels, block, rounding=rounding)
    for index, level in enumerate(levels):
        assert (pruned.kept[index].view(2, ROWS, -1, 4).sum(-1) == level.pattern[0]).all()
        for layer in range(2):
            expected = oracle(weights[layer], hessian, level, 0.01, block, rounding=rounding)
            _assert_close(pruned.weights[index, layer], expected, weights[layer], hessian)


def _assert_close(found: Tensor, expected: Tensor, weight: Tensor, hessian: Tensor) -> None:
    """Same weights but where a decision within float32 rounding of a tie fell the other way, and what follows it."""
    different = (found.double() - expected).abs() > 1e-4
    assert different.any(1).sum() <= 1 or different.double().mean() < 0.2
    assert error_of(weight, found, hessian) == pytest.approx(error_of(weight, expected, hessian), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("patterns", [[], ["2:4"]])
def test_packed_codes_decode_to_the_very_weights_that_were_judged(dtype: torch.dtype, patterns: list[str]) -> None:
    weights, hessian = layer_weights(2, dtype), hessian_of(correlated_inputs(400))
    levels = pattern_levels(ROWS * COLUMNS, COLUMNS, patterns) or levels_at()
    pruned = sparsegpt(weights, inverse_factor(hessian, 0.01), levels, 16, rounding=Rounding(4, 8))
    for index in range(len(levels)):
        for layer in range(2):
            form, parts = pruned.packed(index, layer)
            found = decode(str(form), parts, (ROWS, COLUMNS), dtype)
            assert torch.equal(found, pruned.weights[index, layer]) and found.dtype == dtype
            assert not found[~pruned.kept[index, layer]].any()
            assert all(len(row.unique()) <= 16 for row in found.view(-1, 8).float())
            error = error_of(weights[layer], found, hessian)
            assert float(pruned.errors[index, layer]) == pytest.approx(error, rel=1e-3)


def test_rounding_underway_beats_rounding_afterwards_and_more_bits_are_better() -> None:
    weights, hessian = layer_weights(), hessian_of(correlated_inputs(400))
    factor, levels, highest = inverse_factor(hessian, 0.01), levels_at(0.1, each_way=0), torch.tensor([[7.0]])
    sparse, *rounded = (
        sparsegpt(weights, factor, levels, 16, rounding=rounding)
        for rounding in (None, Rounding(6, 8), Rounding(4, 8), Rounding(3, 8))
    )
    for before, after in pairwise([sparse, *rounded]):
        assert before.errors < after.errors
    values = sparse.weights[0, 0].t().contiguous()
    grids = [fit_grid(part[:, None], highest, symmetric=False, clip_search=True) for part in values.split(8)]
    parts = zip(values.split(8), grids, strict=True)
    afterwards = torch.cat([dequantize(quantize(part[:, None], grid, highest), grid)[:, 0] for part, grid in parts])
    assert rounded[-1].errors < 0.9 * error_of(weights[0], afterwards.t(), hessian)


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
