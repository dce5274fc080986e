"""All methods: what a layer's units may and may not change."""

import pytest
import torch
from torch import Tensor

from evopress.compression.base import LayerMethod
from evopress.compression.formats import decode
from evopress.compression.layers import LayerShape
from evopress.compression.methods.gptq import Gptq
from evopress.compression.methods.pruning import Magnitude, SparseGpt, Wanda
from evopress.util.errors import CompressionError

SHAPE = (16, 64)


def problem() -> tuple[Tensor, Tensor]:
    """Weights and the Hessian of their inputs."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, SHAPE[1], generator=generator)
    return torch.randn(SHAPE, generator=generator), inputs.T @ inputs


@pytest.mark.parametrize("activation_order", [True, False])
@pytest.mark.parametrize("group_size", [16, None])
@pytest.mark.parametrize("exponent", [-45, -27, -20, 17, 40])
def test_weights_in_other_units_are_quantized_alike(exponent, group_size, activation_order):
    """The norm before a layer may be large and its weights small, or the reverse: the same function."""
    weight, hessian = problem()
    settings = Gptq(bits=(2, 4, 8), group_size=group_size, activation_order=activation_order)
    factor = 2.0**exponent
    usual = settings.compress({"layer": weight}, hessian)
    others = settings.compress({"layer": weight * factor}, hessian / factor**2)
    for one, other in zip(usual, others, strict=True):
        assert other.error == pytest.approx(one.error, rel=0.02)
        assert one.parts["scales"].dtype == torch.float16 and other.parts["scales"].dtype == torch.float32
        found = decode(other.format, other.parts, SHAPE, torch.float32) / factor
        assert torch.allclose(found, decode(one.format, one.parts, SHAPE, torch.float32), rtol=0.01, atol=0.01)
        difference = (weight - found).double()
        energy = ((weight.double() @ hessian.double()) * weight).sum()
        error = ((difference @ hessian.double()) * difference).sum() / energy
        assert other.error == pytest.approx(float(error), rel=1e-3)


def test_a_layer_in_other_units_changes_nothing_in_one_that_shares_its_input():
    weight, hessian = problem()
    settings = Gptq(bits=(3, 4), group_size=16)
    alone = settings.compress({"usual": weight}, hessian)
    together = settings.compress({"tiny": weight * 1e-9, "usual": weight}, hessian)[2:]
    for one, other in zip(alone, together, strict=True):
        assert other.layer == "usual" and one.error == other.error
        assert all(torch.equal(one.parts[name], other.parts[name]) for name in one.parts)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("exponent", [-27, 0, 17])
def test_scales_stored_as_bfloat16_take_any_units(exponent: int, symmetric: bool) -> None:
    weight, hessian = problem()
    half, brain = (
        Gptq(bits=(4, 8), group_size=16, symmetric=symmetric, scale_dtype=dtype) for dtype in ("float16", "bfloat16")
    )
    factor = 2.0**exponent
    made = brain.compress({"layer": weight * factor}, hessian / factor**2)
    for one, usual in zip(made, half.compress({"layer": weight}, hessian), strict=True):
        assert one.parts["scales"].dtype == torch.bfloat16 and one.bytes == usual.bytes
        assert one.error == pytest.approx(usual.error, rel=0.2)  # bfloat16 rounds the scales of 8 bits noticeably
        found = decode(one.format, one.parts, SHAPE, torch.float32) / factor
        difference = (weight - found).double()
        energy = ((weight.double() @ hessian.double()) * weight).sum()
        error = ((difference @ hessian.double()) * difference).sum() / energy
        assert one.error == pytest.approx(float(error), rel=1e-3)


@pytest.mark.parametrize("exponent", [-27, 17])
def test_sparse_weights_in_other_units_are_rounded_alike(exponent: int) -> None:
    weight, hessian = problem()
    settings, factor = SparseGpt(bits=4, group_size=16, step=200, levels=1), 2.0**exponent
    usual = settings.compress({"a": weight, "b": weight + 1}, hessian)
    others = settings.compress({"a": weight * factor, "b": weight + 1}, hessian)
    for one, other in zip(usual, others, strict=True):
        scaled = one.layer == "a"
        assert other.parts["scales"].dtype == (torch.float32 if scaled else torch.float16)
        assert other.error == pytest.approx(one.error, rel=1e-3)
        found = decode(other.format, other.parts, SHAPE, torch.float32) / (factor if scaled else 1)
        torch.testing.assert_close(found, decode(one.format, one.parts, SHAPE, torch.float32), rtol=1e-3, atol=1e-3)


METHODS = [
    Gptq(bits=(2, 3, 5, 8), group_size=16),
    Gptq(bits=(3,), group_size=None, symmetric=True),
    SparseGpt(step=100, levels=2),
    SparseGpt(patterns=("1:4", "2:4", "4:8")),
    SparseGpt(bits=4, group_size=16, step=100, levels=2),
    SparseGpt(bits=3, group_size=None, patterns=("1:4", "2:4")),
    Wanda(step=100, levels=20),
    Magnitude(sparsity=0.3, step=1000, levels=2),
]


def shape(rows: int = SHAPE[0], name: str = "layer", columns: int = SHAPE[1]) -> LayerShape:
    return LayerShape(f"model.layers.0.{name}", 0, name, name, rows, columns, itemsize=4)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_levels_are_known_before_they_are_made(method: LayerMethod) -> None:
    weight, hessian = problem()
    made = {(v.level, v.value, v.cost, v.bytes) for v in method.compress({"layer": weight}, hessian)}
    planned = method.levels_of(shape())
    assert {(level.label, level.value, level.cost, level.bytes) for level in planned} == made
    assert len(planned) == len(made) and {level.label for level in planned} <= set(method.labels())


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_less_memory_lowers_the_peak_as_far_as_it_can(method: LayerMethod) -> None:
    layers = [shape(name="q"), shape(name="k")]
    plenty, some, none = (method.peak_bytes(layers, memory) for memory in (1e9, 5e4, 0.0))
    assert plenty >= some >= none > 8 * 2 * shape().parameters + 4 * SHAPE[1] ** 2
    assert method.operations(layers) > method.operations(layers[:1]) >= 2 * shape().parameters * SHAPE[1]


@pytest.mark.parametrize(
    ("method", "layer", "message"),
    [
        (Gptq(group_size=48), shape(), r"model\.layers\.0\.layer: group_size 48 does not divide the 64 input features"),
        (SparseGpt(bits=4, group_size=48), shape(), "layer: group_size 48 does not divide the 64 input features"),
        (Wanda(patterns=("2:7",)), shape(), r"layer: pattern 2:7 needs inputs in multiples of 7, but there are 64"),
        (Magnitude(sparsity=0.9999), shape(rows=1), "layer: sparsity 0.9999 leaves nothing of a layer of 64 weights"),
    ],
)
def test_a_layer_that_cannot_have_the_levels_is_named(method: LayerMethod, layer: LayerShape, message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        method.check([layer], [layer])
