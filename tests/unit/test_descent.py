"""Further passes over the columns: against a plain loop, and against what they are for, less error."""

import gguf
import pytest
import torch
from torch import Tensor

from evopress.compression.descent import Descent
from evopress.compression.gguf_rounding import gguf_gptq
from evopress.compression.gguf_types import GGUF_TYPES
from evopress.compression.gptq import Quantized, gptq
from evopress.compression.layers import LayerShape
from evopress.compression.methods.gguf import Gguf
from evopress.compression.methods.gptq import Gptq
from evopress.compression.methods.pruning import SparseGpt
from evopress.compression.sparsegpt import Rounding, inverse_factor, sparsegpt
from evopress.compression.sparsity import pattern_levels, unstructured_levels

ROWS, COLUMNS = 12, 64
BITS = (2, 3, 4, 6)
OPTIONS = [{}, {"activation_order": True}, {"symmetric": True}, {"clip_search": True, "group_size": None}]


def problem(
    seed: int = 0, rows: int = ROWS, columns: int = COLUMNS, dead: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Weights [rows, columns] and the Hessian of correlated inputs of different sizes, of which some are always 0."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    sizes = torch.exp(0.5 * torch.randn(columns, generator=generator))
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixing * sizes
    inputs[:, list(dead)] = 0
    return torch.randn(rows, columns, generator=generator), inputs.t() @ inputs


def damped(hessian: Tensor, damping: float = 0.01) -> Tensor:
    """With its share of the mean diagonal added, float64."""
    wide = hessian.double()
    return wide + damping * wide.diagonal().mean() * torch.eye(len(wide), dtype=torch.float64)


def error(weight: Tensor, other: Tensor, hessian: Tensor) -> Tensor:
    """tr(dW H dW^T), float64; leading dimensions are kept."""
    deviation = other.double() - weight.double()
    return ((deviation @ hessian.double()) * deviation).sum((-2, -1))


@pytest.mark.parametrize("block_size", [1, 7, 64, 128])
def test_a_pass_is_a_plain_loop_over_columns(block_size: int) -> None:
    """Each column in turn goes to the integer nearest to where the error is least, the others as they are by then."""
    weight, hessian = problem()
    wide, expected = damped(hessian), weight.double().round()
    start = expected.clone()
    for column in range(COLUMNS):
        pull = (weight.double() - expected) @ wide[:, column]
        expected[:, column] = (expected[:, column] + pull / wide[column, column]).round()
    assert (expected != start).float().mean() > 0.1, "there is something to improve"

    found = start.float().t().clone()[:, None]

    def choose(column: int, values: Tensor) -> Tensor:
        found[column] = values.round()
        return found[column]

    deviation = weight.t()[:, None] - found
    shift = 0.01 * float(hessian.diagonal().mean())
    Descent(hessian, shift).run(weight.t(), deviation, choose, block_size)
    assert (found[:, 0].t().double() != expected).any(1).sum() <= 1, "a tie may fall the other way, in one row"
    assert torch.allclose(deviation, weight.t()[:, None] - found, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
def test_integers_get_better_with_every_pass(options: dict[str, object]) -> None:
    weight, hessian = problem(1)
    made = [gptq(weight, hessian, BITS, **{"group_size": 16, "passes": n, **options}) for n in range(5)]
    errors = torch.stack([error(weight, result.weights, damped(hessian)) for result in made])
    assert (errors[1:] <= errors[:-1] * (1 + 1e-5)).all()
    assert (errors[2] < 0.95 * errors[0]).all(), "two passes take off more than a twentieth at any bit-width"
    for result in made:
        assert torch.allclose(result.errors.sum(1), error(weight, result.weights, hessian), rtol=1e-3)


@pytest.mark.parametrize("symmetric", [False, True])
def test_scales_end_where_none_alone_could_be_better(symmetric: bool) -> None:
    """What passes converge to: no scale can move by more than its rounding, and no code by one step."""
    weight, hessian = problem(2)
    result = gptq(weight, hessian, (3,), 16, symmetric, passes=50)
    wide = damped(hessian)
    pull = (weight.double() - result.weights[0].double()) @ wide
    codes = (result.codes[0].view(ROWS, 4, 16).double() - result.zeros[0][..., None].double()).clone()
    for group in range(4):
        own = slice(16 * group, 16 * group + 16)
        c = codes[:, group]
        move = (pull[:, own] * c).sum(1) / ((c @ wide[own, own]) * c).sum(1)
        assert (move.abs() <= result.scales[0][:, group].double() * 2.0**-11 + 1e-9).all()
    steps = result.scales[0].double().repeat_interleave(16, 1)
    best = pull / wide.diagonal() / steps
    at_end = (result.codes[0] == 0) & (best < 0) | (result.codes[0] == 7) & (best > 0)
    assert (best.abs()[~at_end] <= 0.5 + 1e-3).all()


@pytest.mark.parametrize("rows_at_once", [1, 5])
def test_rows_in_parts_and_levels_alone_change_nothing(rows_at_once: int) -> None:
    weight, hessian = problem(3)
    whole = gptq(weight, hessian, BITS, 16, passes=2)
    _assert_same(gptq(weight, hessian, BITS, 16, passes=2, rows_at_once=rows_at_once), whole, slice(None))
    for index, bits in enumerate(BITS):
        _assert_same(gptq(weight, hessian, [bits], 16, passes=2), whole, slice(index, index + 1))


def _assert_same(one: Quantized, other: Quantized, levels: slice) -> None:
    """Same weights, but for a row in which a different order of float32 sums flips a tie."""
    assert ((one.weights - other.weights[levels]).abs().amax(2) > 1e-5).sum() <= 1


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "IQ4_NL", "Q2_K", "Q3_K", "Q6_K", "IQ4_XS"])
def test_gguf_types_get_better_with_every_pass(name: str) -> None:
    weight, hessian = problem(4, columns=512)
    kind, oracle = GGUF_TYPES[name], gguf.GGMLQuantizationType[name]
    made = [gguf_gptq(weight, hessian, [kind], passes=n)[0] for n in range(4)]
    weights = [torch.from_numpy(gguf.dequantize(result.blocks.numpy(), oracle)) for result in made]
    errors = torch.stack([error(weight, one, damped(hessian)) for one in weights])
    assert (errors[1:] <= errors[:-1] * (1 + 1e-5)).all()
    assert errors[2] < 0.98 * errors[0]
    for result, one in zip(made, weights, strict=True):
        assert float(result.errors.sum()) == pytest.approx(float(error(weight, one, hessian)), rel=1e-3)


@pytest.mark.parametrize("order", [False, True])
def test_gguf_types_together_and_rows_in_parts_are_what_each_is_alone(order: bool) -> None:
    weight, hessian = problem(9, columns=512, dead=(5, 300))
    kinds = [GGUF_TYPES[name] for name in ("Q4_1", "IQ4_NL", "Q2_K", "Q6_K")]
    together = gguf_gptq(weight, hessian, kinds, order, passes=2, rows_at_once=5)
    for kind, result in zip(kinds, together, strict=True):
        alone, before = (gguf_gptq(weight, hessian, [kind], order, passes=passes)[0] for passes in (2, 0))
        oracle = gguf.GGMLQuantizationType[kind.name]
        one, other = (torch.from_numpy(gguf.dequantize(made.blocks.numpy(), oracle)) for made in (result, alone))
        assert ((one - other).abs().amax(1) > 1e-6).sum() <= 1, "a tie may fall the other way, in one row"
        assert float(result.errors.sum()) == pytest.approx(float(error(weight, one, hessian)), rel=1e-3)
        assert float(result.errors.sum()) < 0.99 * float(before.errors.sum())


def test_numbers_that_their_type_cannot_hold_stay_as_they_were() -> None:
    """Products beyond float32, scales below what float16 has: nothing turns into NaN or zero."""
    weight, hessian = problem(10)
    before, huge = (
        gptq(weight * 1e-12, hessian * 1e33, (2, 8), 16, passes=passes, scale_dtype=torch.bfloat16) for passes in (0, 2)
    )
    assert (huge.errors.sum(1) < before.errors.sum(1)).all()
    weight[:, :16] *= 1e-7
    result = gptq(weight, hessian, (2, 4), 16, passes=2)
    assert torch.isfinite(result.weights).all() and (result.scales > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kept_weights_are_judged_as_their_type_stores_them(dtype: torch.dtype) -> None:
    weight, hessian = problem(11, rows=2 * ROWS)
    weights = weight.to(dtype).view(2, ROWS, COLUMNS)
    factor, levels = inverse_factor(hessian, 0.01), unstructured_levels(ROWS * COLUMNS, 0.5, 96, 1)
    pruned = sparsegpt(weights, factor, levels, descent=Descent(hessian, factor.shift), passes=2)
    before = sparsegpt(weights, factor, levels)
    assert pruned.weights.dtype == dtype and torch.equal(pruned.kept, before.kept)
    for level in range(len(levels)):
        for layer in range(2):
            judged = float(error(weights[layer], pruned.weights[level, layer], hessian))
            assert float(pruned.errors[level, layer]) == pytest.approx(judged, rel=1e-3)
            assert judged < 0.97 * float(before.errors[level, layer])


@pytest.mark.parametrize(
    "levels",
    [unstructured_levels(ROWS * COLUMNS, 0.6, 48, 1), pattern_levels(ROWS * COLUMNS, COLUMNS, ["2:4", "1:4"])],
)
def test_kept_weights_end_at_least_squares(levels: list) -> None:
    """Masks stay; with enough passes nothing that keeps to them is better."""
    weight, hessian = problem(5)
    factor = inverse_factor(hessian, 0.01)
    descent, wide = Descent(hessian, factor.shift), damped(hessian)
    first, two, many = (
        sparsegpt(weight[None], factor, levels, descent=descent, passes=passes) for passes in (0, 2, 300)
    )
    assert torch.equal(first.kept, many.kept)
    for level in range(len(levels)):
        best = torch.zeros_like(weight, dtype=torch.float64)
        for row, kept in enumerate(first.kept[level, 0]):
            right = (weight[row].double() @ wide)[kept]
            best[row, kept] = torch.linalg.solve(wide[kept][:, kept], right)
        least = float(error(weight, best, wide))
        assert float(error(weight, many.weights[level, 0], wide)) == pytest.approx(least, rel=1e-3)
        before, after = (float(error(weight, one.weights[level, 0], wide)) for one in (first, two))
        assert after - least < 0.3 * (before - least), "two passes go most of the way"
        assert (many.weights[level, 0][~first.kept[level, 0]] == 0).all()
        assert float(two.errors[level, 0]) == pytest.approx(
            float(error(weight, two.weights[level, 0], hessian)), rel=1e-3
        )


def test_kept_integers_get_better_and_decode_to_what_was_judged() -> None:
    weight, hessian = problem(6)
    factor, levels = inverse_factor(hessian, 0.01), unstructured_levels(ROWS * COLUMNS, 0.5, 48, 0)
    descent = Descent(hessian, factor.shift)
    made = [
        sparsegpt(weight[None], factor, levels, rounding=Rounding(4, 16), descent=descent, passes=passes)
        for passes in (0, 1, 2)
    ]
    errors = [float(error(weight, one.weights[0, 0], damped(hessian))) for one in made]
    assert errors[2] < errors[1] < 0.97 * errors[0]
    rounded = made[2].rounded
    codes = rounded.codes[0, 0].view(ROWS, 4, 16).float() - rounded.zeros[0, 0][..., None].float()
    assert torch.equal((codes * rounded.scales[0, 0][..., None].float()).view(ROWS, COLUMNS), made[2].weights[0, 0])


@pytest.mark.parametrize("order", [False, True])
def test_dead_inputs_stay_zero(order: bool) -> None:
    dead = (3, 17)
    weight, hessian = problem(7, dead=dead)
    assert (gptq(weight, hessian, BITS, 16, activation_order=order, passes=2).weights[:, :, dead] == 0).all()
    factor = inverse_factor(hessian, 0.01)
    levels = unstructured_levels(ROWS * COLUMNS, 0.5, 48, 0)
    pruned = sparsegpt(weight[None], factor, levels, descent=Descent(hessian, factor.shift), passes=2)
    assert (pruned.weights[..., list(dead)] == 0).all()
    nothing = gptq(weight, torch.zeros_like(hessian), BITS, 16, passes=2)
    assert (nothing.weights == 0).all() and (nothing.errors == 0).all()


@pytest.mark.parametrize(
    "method", [Gptq(method="gptq", passes=0), Gguf(method="gguf", passes=0), SparseGpt(method="sparsegpt", passes=0)]
)
def test_passes_are_planned_for_and_made_by_default(method: Gptq | Gguf | SparseGpt) -> None:
    weight, hessian = problem(8, columns=256, rows=64)
    usual = type(method)(method=method.method)
    if isinstance(method, SparseGpt):
        method, usual = (one.model_copy(update={"step": 1000, "levels": 2}) for one in (method, usual))
    before, after = (one.compress({"layer": weight}, hessian) for one in (method, usual))
    assert [variant.bytes for variant in after] == [variant.bytes for variant in before]
    assert sum(variant.error for variant in after) < 0.97 * sum(variant.error for variant in before)
    layers = [LayerShape("layer", 0, "layer", "layer", 64, 256, 4)]
    assert usual.operations(layers) > 2 * method.operations(layers)
    assert usual.peak_bytes(layers, 1e12) > method.peak_bytes(layers, 1e12)
