"""All methods: what a layer's units may and may not change."""

import pytest
import torch
from torch import Tensor

from evopress.compression.formats import decode
from evopress.compression.methods.gptq import Gptq

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
