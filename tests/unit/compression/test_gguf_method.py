"""Quantization to GGUF types: grids, error feedback, rounding to nearest, and the method that offers them."""

import math

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from evopress.compression import gguf_rounding
from evopress.compression.cholesky import sweep_columns
from evopress.compression.formats.gguf import GgufFormat, encode, values_of
from evopress.compression.gguf_grids import fit_grids, nearest_codes
from evopress.compression.gguf_rounding import gguf_gptq, round_to_nearest
from evopress.compression.gguf_types import GGUF_TYPES
from evopress.compression.layers import LayerShape
from evopress.compression.methods.gguf import Gguf
from evopress.config.base import parse_section
from evopress.util.errors import CompressionError, ConfigError

WITH_GRID = [name for name, kind in GGUF_TYPES.items() if kind.grid]
ROWS, COLUMNS = 6, 512


def problem(columns: int = COLUMNS, rows: int = ROWS, correlated: bool = True) -> tuple[Tensor, Tensor]:
    """Weights [rows, columns], and the Hessian of inputs of different sizes that have much in common, or nothing."""
    generator = torch.Generator().manual_seed(columns)
    inputs = torch.randn(1500, columns, generator=generator)
    if correlated:
        common = torch.randn(1500, 8, generator=generator) @ torch.randn(8, columns, generator=generator)
        inputs = (inputs + 0.5 * common) * torch.exp(0.5 * torch.randn(columns, generator=generator))
    return 0.02 * torch.randn(rows, columns, generator=generator), inputs.t() @ inputs


def decoded(blocks: Tensor, name: str) -> Tensor:
    """By the oracle."""
    return torch.from_numpy(gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name]))


def row_errors(weight: Tensor, quantized: Tensor, hessian: Tensor) -> Tensor:
    """Rows of tr(dW H dW^T), float64."""
    deviation = (quantized - weight).double()
    return ((deviation @ hessian.double()) * deviation).sum(1)


def rounded(weight: Tensor, importance: Tensor, name: str) -> Tensor:
    """Each weight rounded to the nearest on the grids that are fitted for it."""
    kind = GGUF_TYPES[name]
    assert kind.grid is not None
    grids = fit_grids(weight.float(), importance, kind)
    grouped, steps, offsets = weight.float().unflatten(1, (-1, kind.grid.group)), grids.steps(), grids.offsets()
    scaled = grouped if offsets is None else grouped - offsets[..., None]
    scaled = scaled * torch.where(steps == 0, 0.0, 1 / steps)[..., None]
    return decoded(encode(nearest_codes(scaled, kind.grid).flatten(1), grids, kind)["blocks"], name)


@pytest.mark.parametrize("name", WITH_GRID)
def test_what_is_packed_is_what_was_judged(name, monkeypatch):
    """The deviations that errors were computed and fed back from are those of the packed weights, bit for bit."""
    weight, hessian = problem()
    kind, seen = GGUF_TYPES[name], []

    def watched(panel, feedback, widths, column):
        sweep_columns(panel, feedback, widths, column)
        seen.append((column.__self__.panel[:, 0].t().clone(), column.__self__.order))

    monkeypatch.setattr(gguf_rounding, "sweep_columns", watched)
    (result,) = gguf_gptq(weight, hessian, [kind])
    ((deviation, order),) = seen
    packed = decoded(result.blocks, name)
    assert torch.equal(deviation, (weight - packed)[:, order])
    torch.testing.assert_close(result.errors, row_errors(weight, packed, hessian), rtol=5e-3, atol=0.0)  # float32 sums


@pytest.mark.parametrize("order", [False, True])
def test_is_gptq_with_fixed_grids_column_by_column(order):
    """Against the textbook: after each column, what is left is updated by the inverse Hessian's factor."""
    weight, hessian = problem(256)
    kind = GGUF_TYPES["Q3_K"]
    (result,) = gguf_gptq(weight, hessian, [kind], activation_order=order, damping=0.01, block_size=24)
    permutation = torch.argsort(hessian.diagonal(), descending=True, stable=True) if order else torch.arange(256)
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(256, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped[permutation][:, permutation]), upper=True)
    importance = torch.empty(256)
    importance[permutation] = upper.diagonal().pow(-2).float()
    steps = fit_grids(weight, importance, kind).steps()
    left, textbook = weight.double()[:, permutation], torch.empty(ROWS, 256)
    for position, column in enumerate(permutation.tolist()):
        step = steps[:, column // 16]
        textbook[:, column] = (left[:, position].float() / step).round().clamp(-4, 3) * step
        error = (left[:, position] - textbook[:, column].double()) / upper[position, position]
        left[:, position:] -= error[:, None] * upper[position, position:]
    # A weight that lies between two codes within float32 may fall either way, and the rest of its row follows it.
    different = (decoded(result.blocks, "Q3_K") - textbook).abs().amax(1) > 1e-6
    assert different.sum() <= 1


def test_types_in_one_pass_are_what_each_is_alone():
    weight, hessian = problem()
    kinds = [GGUF_TYPES[name] for name in ("Q2_K", "Q4_0", "Q4_1", "IQ4_XS", "Q8_0")]
    together = gguf_gptq(weight, hessian, kinds, rows_at_once=4)
    for kind, result in zip(kinds, together, strict=True):
        (alone,) = gguf_gptq(weight, hessian, [kind])
        assert result.damping == alone.damping
        # Products of matrices of other shapes may round differently, and a row follows a weight between two codes.
        assert (result.blocks != alone.blocks).any(1).sum() <= 1


@pytest.mark.parametrize("name", WITH_GRID)
def test_feedback_beats_rounding(name):
    weight, hessian = problem()
    (result,) = gguf_gptq(weight, hessian, [GGUF_TYPES[name]])
    alone = row_errors(weight, rounded(weight, hessian.diagonal(), name), hessian).sum()
    assert result.errors.sum() < 0.6 * alone


@pytest.mark.parametrize("name", WITH_GRID)
def test_each_weight_takes_its_nearest_value(name):
    """No other code of any weight would be nearer, by brute force."""
    kind, (weight, hessian) = GGUF_TYPES[name], problem(rows=2)
    grids = fit_grids(weight, hessian.diagonal(), kind)
    lines = [grids.steps(), torch.zeros_like(grids.steps()) if kind.grid.offset is None else grids.offsets()]
    steps, offsets = (line.repeat_interleave(kind.grid.group, 1)[..., None] for line in lines)
    possible = torch.tensor(kind.grid.values) * steps + offsets
    least = (possible - weight[..., None]).abs().amin(2)
    torch.testing.assert_close((rounded(weight, hessian.diagonal(), name) - weight).abs(), least, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in WITH_GRID if name != "Q5_1"])
def test_grids_are_no_worse_than_those_of_llama_cpp(name):
    """Q5_1, where both are within a percent of each other, aside."""
    libgguf = pytest.importorskip("libgguf")
    weight, hessian = problem(rows=32)
    importance = hessian.diagonal()
    theirs = libgguf.quantize_rows(weight.numpy(), libgguf.GGMLQuantizationType[name], importance.numpy())
    theirs = decoded(torch.from_numpy(theirs), name)
    ours = rounded(weight, importance, name)
    assert (importance * (ours - weight).square()).sum() < 0.99 * (importance * (theirs - weight).square()).sum()


@pytest.mark.parametrize("name", WITH_GRID)
def test_a_weight_on_some_grid_of_the_type_is_nearly_kept(name):
    """Weights that come from a file of the same type lose little, although nothing tells of their grids."""
    kind, (weight, hessian) = GGUF_TYPES[name], problem()
    (once,) = gguf_gptq(weight, hessian, [kind])
    held = decoded(once.blocks, name)
    (twice,) = gguf_gptq(held, hessian, [kind])
    assert twice.errors.sum() < 0.2 * once.errors.sum()


@pytest.mark.parametrize("name", WITH_GRID)
def test_dead_inputs_and_zero_weights_stay_finite(name):
    weight, hessian = problem()
    weight[0] = 0.0
    weight[1, :256] = 0.0
    hessian[:, 30:290] = hessian[30:290] = 0.0
    (result,) = gguf_gptq(weight, hessian, [GGUF_TYPES[name]])
    quantized = decoded(result.blocks, name)
    assert bool(quantized.isfinite().all())
    assert not quantized[0].any()
    torch.testing.assert_close(result.errors, row_errors(weight, quantized, hessian), rtol=5e-3, atol=1e-12)


def test_too_large_weights_are_refused():
    weight, hessian = problem()
    with pytest.raises(CompressionError, match="too large for the float16 steps of Q4_0"):
        gguf_gptq(weight * 1e9, hessian, [GGUF_TYPES["Q4_0"]])


def layer(name: str, rows: int, columns: int) -> LayerShape:
    return LayerShape(f"model.layers.0.{name}", 0, name, name, rows, columns, 2)


@pytest.mark.parametrize("columns, expected", [(512, ["Q2_K", "Q4_0", "Q6_K", "Q8_0"]), (96, ["Q4_0", "Q8_0"])])
def test_method_makes_exactly_the_levels_that_it_announces(columns, expected):
    method = Gguf(types=("Q8_0", "Q6_K", "Q2_K", "Q4_0"))
    shapes = [layer("q", 5, columns), layer("k", 3, columns)]
    weight, hessian = problem(columns, rows=8)
    weights = {"q": weight[:5].bfloat16(), "k": weight[5:].bfloat16()}
    variants = method.compress(weights, hessian, memory=math.inf)
    assert method.labels() == ["Q2_K", "Q4_0", "Q6_K", "Q8_0"]
    for shape in shapes:
        own = [variant for variant in variants if variant.layer == shape.layer]
        levels = method.levels_of(shape)
        assert [level.label for level in levels] == [variant.level for variant in own] == expected
        for level, variant in zip(levels, own, strict=True):
            assert (level.value, level.cost, level.bytes) == (variant.value, variant.cost, variant.bytes)
            assert level.cost == 8 * level.bytes == level.value * shape.parameters
            form = GgufFormat.parse(variant.format)
            quantized = form.decode(variant.parts, (shape.rows, columns), torch.float32)
            np.testing.assert_array_equal(quantized, decoded(variant.parts["blocks"], variant.level))
            dense = weights[shape.layer].float()
            energy = row_errors(dense, torch.zeros(()), hessian).sum()
            error = float(row_errors(dense, quantized, hessian).sum() / energy)
            assert variant.error == pytest.approx(error, rel=5e-3)
        errors = [variant.error for variant in own]
        assert errors == sorted(errors, reverse=True)


def test_little_memory_changes_no_byte_but_where_sums_round():
    weight, hessian = problem()
    method = Gguf(types=("Q4_K",))
    (ample,) = method.compress({"q": weight}, hessian, memory=math.inf)
    (little,) = method.compress({"q": weight}, hessian, memory=1.0)
    assert (ample.parts["blocks"] != little.parts["blocks"]).any(1).sum() <= 1


def test_a_second_run_gives_the_same_bytes():
    weight, hessian = problem()
    first, second = (Gguf().compress({"q": weight}, hessian, memory=math.inf) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.parts["blocks"], other.parts["blocks"])


def test_rounding_to_nearest_has_every_type_and_uses_importance():
    pytest.importorskip("libgguf")
    weight, hessian = problem(256, rows=2, correlated=False)
    hessian[:, ::2] *= 100
    hessian[::2] *= 100
    types = ("IQ3_XXS", "Q2_K", "Q4_0", "IQ4_XS", "Q8_0")
    method, flat = Gguf(types=types, rounding="rtn"), torch.eye(256)
    aware = method.compress({"q": weight}, hessian, memory=math.inf)
    unaware = method.compress({"q": weight}, flat, memory=math.inf)
    assert [variant.level for variant in aware] == ["Q2_K", "IQ3_XXS", "IQ4_XS", "Q4_0", "Q8_0"]
    for one, other in zip(aware, unaware, strict=True):
        quantized = decoded(one.parts["blocks"], one.level)
        expected = row_errors(weight, quantized, hessian).sum() / row_errors(weight, torch.zeros(()), hessian).sum()
        assert one.error == pytest.approx(float(expected), rel=1e-3)
        if one.level != "Q8_0":  # the one type whose scale is the largest weight, whatever counts
            blind = decoded(other.parts["blocks"], other.level)
            assert row_errors(weight, quantized, hessian).sum() < row_errors(weight, blind, hessian).sum()


@pytest.mark.parametrize("dead", [slice(0, 0), slice(20, 60), slice(0, 256)], ids=["none", "some", "all"])
@pytest.mark.parametrize("name", ["Q2_K", "Q4_0", "IQ3_XXS"])
def test_rounding_to_nearest_with_dead_inputs_stays_finite(name, dead):
    pytest.importorskip("libgguf")
    weight, hessian = problem(256, rows=2)
    hessian[dead] = hessian[:, dead] = 0.0
    (variant,) = Gguf(types=(name,), rounding="rtn").compress({"q": weight}, hessian, memory=math.inf)
    quantized = decoded(variant.parts["blocks"], name)
    assert bool(quantized.isfinite().all())
    assert (quantized - weight).square().sum() < 0.5 * weight.square().sum()
    assert 0.0 <= variant.error < 0.5


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_rounding_to_nearest_is_that_of_llama_cpp_byte_for_byte(rows, monkeypatch):
    libgguf = pytest.importorskip("libgguf")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    weight, hessian = problem(256, rows)
    importance = hessian.diagonal()
    expected = libgguf.quantize_rows(weight.numpy(), libgguf.GGMLQuantizationType.Q4_K, importance.numpy())
    np.testing.assert_array_equal(round_to_nearest(weight, importance, GGUF_TYPES["Q4_K"]), expected)


def test_rounding_to_nearest_says_what_it_needs(monkeypatch):
    monkeypatch.setattr("evopress.compression.gguf_rounding.find_spec", lambda name: None)
    weight, hessian = problem(256)
    with pytest.raises(CompressionError, match=r"pip install -e '\.\[gguf\]'"):
        Gguf(types=("Q4_0",), rounding="rtn").compress({"q": weight}, hessian, memory=math.inf)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"types": ["Q4_K_M"]}, "mixture of types"),
        ({"types": ["q4_k"]}, "did you mean 'Q4_K'"),
        ({"types": ["int4"]}, "there are: Q4_0"),
        ({"types": ["Q4_0", "Q4_0"]}, "named twice"),
        ({"types": []}, "types"),
        ({"types": ["IQ2_XS", "Q4_0"]}, "IQ2_XS take weights from codebooks"),
        ({"rounding": "nearest"}, "rounding"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        parse_section(Gguf, {"method": "gguf"} | settings, "variants.g")


def test_layers_without_any_type_are_refused():
    with pytest.raises(CompressionError, match="rows of 96 weights"):
        Gguf(types=("Q4_K", "IQ4_XS")).levels_of(layer("q", 4, 96))


def test_targets_beyond_the_types():
    method = Gguf(types=("Q4_K", "Q2_K"))
    assert list(method.target_problems(3.0, "searches.s")) == []
    (low,) = method.target_problems(2.5, "searches.s")
    assert low.startswith("searches.s.target: 2.5 bits is below the smallest type (Q2_K, 2.625 bits")
    (high,) = method.target_problems(5, "searches.s")
    assert "above the largest type (Q4_K, 4.5 bits" in high


@pytest.mark.parametrize("rounding", ["gptq", "rtn"])
def test_foresees_more_where_there_is_more(rounding):
    method = Gguf(types=("Q4_0", "Q8_0"), rounding=rounding)
    small, large = [layer("q", 64, 128)], [layer("q", 64, 128), layer("k", 64, 128)]
    assert method.peak_bytes(small, 1e9) < method.peak_bytes(large, 1e9)
    assert method.operations(small) < method.operations(large)
    dense = 64 * 128
    assert method.peak_bytes(small, 1.0) > 8 * dense + 4 * 128**2


def test_values_of_codes_are_those_of_the_grid():
    grid = GGUF_TYPES["IQ4_NL"].grid
    assert values_of(torch.arange(16, dtype=torch.uint8), grid).tolist() == list(grid.values)
