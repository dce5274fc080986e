"""Quantization grids."""

import pytest
import torch

from evopress.compression.grid import dequantize, fit_grid, highest_codes, quantize, scale_exponent
from evopress.util.errors import CompressionError

BITS = torch.tensor([2, 3, 4, 8])


def weights(rows: int = 5, inputs: int = 16, seed: int = 0) -> torch.Tensor:
    """[inputs, 1, rows], with a few outliers."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(inputs, 1, rows, generator=generator)
    values[0, 0, 0] = 8.0
    return values


@pytest.mark.parametrize("symmetric", [False, True])
def test_rounding_error_is_at_most_half_a_step(symmetric):
    values, highest = weights(), highest_codes(BITS)[:, None]
    grid = fit_grid(values, highest, symmetric=symmetric)
    codes = quantize(values, grid, highest)
    assert codes.shape == (16, 4, 5) and (codes >= 0).all() and (codes <= highest).all()
    error = (dequantize(codes, grid) - values).abs()
    # A rounded zero point may clip the ends by half a step, a rounded scale by one part in 2^11; the upper end of a
    # symmetric grid lies half a step above its last code.
    assert (error <= grid.scales * 1.001 + 2**-11 * values.abs().amax(0)).all()
    inside = (codes > 0) & (codes < highest)
    assert (error <= grid.scales * 0.5001)[inside].all()


def test_scales_are_what_float16_stores():
    grid = fit_grid(weights(), highest_codes(BITS)[:, None], symmetric=False)
    assert torch.equal(grid.scales.half().float(), grid.scales)
    assert torch.equal(grid.zeros, grid.zeros.round())


@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_is_represented_exactly(symmetric):
    """A pruned weight or a dead input must decode to zero, whatever the range."""
    values = torch.rand(16, 1, 3) + 1.0
    values[3] = 0.0
    highest = highest_codes(BITS)[:, None]
    grid = fit_grid(values, highest, symmetric=symmetric)
    assert (dequantize(quantize(values, grid, highest), grid)[3] == 0).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_group_of_zeros(symmetric):
    values, highest = torch.zeros(8, 1, 2), highest_codes(BITS)[:, None]
    grid = fit_grid(values, highest, symmetric=symmetric, clip_search=True)
    assert (dequantize(quantize(values, grid, highest), grid) == 0).all()


def test_levels_together_equal_levels_alone():
    values = weights()
    together = fit_grid(values, highest_codes(BITS)[:, None], symmetric=False, clip_search=True)
    for index, bits in enumerate(BITS):
        alone = fit_grid(values, highest_codes(bits.view(1, 1)), symmetric=False, clip_search=True)
        assert torch.equal(alone.scales[0], together.scales[index])
        assert torch.equal(alone.zeros[0], together.zeros[index])


@pytest.mark.parametrize("width", [1, 5, 16])
def test_errors_summed_over_parts_of_a_wide_group_choose_the_same_clipping(width, monkeypatch):
    values, highest = weights(rows=64), highest_codes(BITS)[:, None]
    importance = torch.linspace(0.1, 1.1, 16)
    whole = fit_grid(values, highest, symmetric=False, importance=importance, clip_search=True)
    monkeypatch.setattr("evopress.compression.grid._INPUTS_AT_ONCE", width)
    parts = fit_grid(values, highest, symmetric=False, importance=importance, clip_search=True)
    assert torch.equal(parts.scales, whole.scales) and torch.equal(parts.zeros, whole.zeros)


def test_clip_search_never_rounds_worse_by_its_own_measure():
    values, highest = weights(rows=64), highest_codes(BITS)[:, None]
    importance = torch.rand(16) + 0.1

    def error(clip: bool) -> torch.Tensor:
        grid = fit_grid(values, highest, symmetric=False, importance=importance, clip_search=clip)
        residual = dequantize(quantize(values, grid, highest), grid) - values
        return torch.einsum("ilr,i->lr", residual.square(), importance)

    clipped, spanned = error(True), error(False)
    assert (clipped <= spanned * (1 + 1e-5)).all()
    assert clipped[0].sum() < 0.9 * spanned[0].sum()  # at 2 bits it pays


def test_clip_search_protects_important_inputs():
    """An outlier that matters keeps its place; one that does not is clipped."""
    values, highest = weights(rows=1), highest_codes(torch.tensor([[2]]))
    matters = torch.full((16,), 1e-3)
    matters[0] = 1e3
    ignored = torch.ones(16)
    ignored[0] = 1e-6

    def outlier(importance: torch.Tensor) -> float:
        grid = fit_grid(values, highest, symmetric=False, importance=importance, clip_search=True)
        return float(dequantize(quantize(values, grid, highest), grid)[0, 0, 0])

    assert outlier(matters) > 6.5
    assert outlier(ignored) < 5.5


def test_weights_beyond_float16_scales():
    with pytest.raises(CompressionError, match="too large for a float16 scale"):
        fit_grid(torch.full((4, 1, 1), 1e9), highest_codes(torch.tensor([[2]])), symmetric=False)


@pytest.mark.parametrize("factor", [1e3, 1.0, 0.02, 1e-3])
def test_weights_of_usual_sizes_stay_as_they_are(factor):
    weight = factor * torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    assert scale_exponent(weight, torch.ones(64), (2, 8), 16) == 0


@pytest.mark.parametrize("factor", [1e-36, 1e-12, 1e-6, 1e6, 1e30])
def test_other_weights_come_within_the_range_of_float16(factor):
    weight = factor * torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    scaled = weight * 2.0 ** scale_exponent(weight, torch.ones(64), (2, 8), 64)
    assert float(scaled.abs().max()) / 255 > 4 * 2**-14 and float(scaled.abs().max()) < 65504


def test_small_groups_matter_by_their_share_of_the_output():
    weight, diagonal = torch.ones(4, 32), torch.ones(32)
    weight[:, 16:] = 1e-7
    assert scale_exponent(weight, diagonal, (4,), 16) == 0
    diagonal[16:] = 1e14
    assert scale_exponent(weight, diagonal, (4,), 16) > 0
    assert scale_exponent(torch.zeros(4, 32), diagonal, (4,), 16) == 0


@pytest.mark.parametrize("symmetric", [False, True])
def test_scales_may_be_what_bfloat16_stores(symmetric):
    """Its range needs no other units: neither for tiny weights, nor for huge ones."""
    highest = highest_codes(BITS)[:, None]
    for factor in (2.0**-60, 1.0, 2.0**60):
        values = weights() * factor
        grid = fit_grid(values, highest, symmetric=symmetric, clip_search=True, scale_dtype=torch.bfloat16)
        assert torch.equal(grid.scales.bfloat16().float(), grid.scales)
        error = (dequantize(quantize(values, grid, highest), grid) - values).square().sum(0)
        assert (error < (0.6 if symmetric else 0.3) * values.square().sum(0)).all()
    zeros = fit_grid(torch.zeros(8, 1, 2), highest, symmetric=symmetric, scale_dtype=torch.bfloat16)
    assert (dequantize(quantize(torch.zeros(8, 1, 2), zeros, highest), zeros) == 0).all()
