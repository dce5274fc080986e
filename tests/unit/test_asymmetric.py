"""Asymmetric calibration: the closed form against least squares on explicit data, and what is observed for it."""

import architectures
import pytest
import torch
from test_gptq import output_error
from test_hessian import SEQUENCES, prepare
from torch import Tensor

from evopress.compression.asymmetric import asymmetric_target, observe_both
from evopress.compression.gptq import gptq
from evopress.compression.hessian import embed, observe_block
from evopress.models.blockwise import BlockwiseModel
from evopress.models.structure import layer_table

ROWS, COLUMNS, SAMPLES = 7, 24, 90
DAMPING = 0.02


def data(seed: int = 0, noise: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [rows, columns], inputs in the compressed model and in the dense one [samples, columns], float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=torch.float64)
    dense = torch.randn(SAMPLES, COLUMNS, generator=generator, dtype=torch.float64) @ mixing
    compressed = dense + noise * torch.randn(SAMPLES, COLUMNS, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    return weight, compressed, dense


def target_of(weight: Tensor, compressed: Tensor, dense: Tensor) -> Tensor:
    return asymmetric_target(weight, compressed.t() @ compressed, (dense - compressed).t() @ compressed, DAMPING)


def test_the_target_is_the_least_squares_solution():
    """Of W dense = Q compressed, with rows sqrt(s) (Q - W) = 0 beneath that stand for the damping."""
    weight, compressed, dense = data()
    shift = (DAMPING * (compressed.t() @ compressed).diagonal().mean()).sqrt() * torch.eye(COLUMNS).double()
    left, right = torch.cat([compressed, shift]), torch.cat([dense @ weight.t(), shift @ weight.t()])
    expected = torch.linalg.lstsq(left, right).solution.t()
    torch.testing.assert_close(target_of(weight, compressed, dense), expected, rtol=1e-9, atol=1e-9)


def test_errors_about_the_target_are_those_of_the_outputs_but_for_a_constant():
    """Whatever the weights are that a method ends up with: so the method needs no other change."""
    weight, compressed, dense = data(1)
    hessian = compressed.t() @ compressed
    shift = DAMPING * hessian.diagonal().mean()
    target = target_of(weight, compressed, dense)

    def output(q: Tensor) -> Tensor:
        return (q @ compressed.t() - weight @ dense.t()).square().sum() + shift * (q - weight).square().sum()

    def about_target(q: Tensor) -> Tensor:
        return output_error(target, q, hessian + shift * torch.eye(COLUMNS))

    candidates = [weight, target, weight.round(), 0 * weight, data(2)[0]]
    constants = torch.stack([output(q) - about_target(q) for q in candidates])
    torch.testing.assert_close(constants, constants[:1].expand_as(constants), rtol=1e-7, atol=0)


def test_the_same_inputs_leave_the_weights_as_they_are():
    weight, compressed, _ = data(3)
    torch.testing.assert_close(target_of(weight, compressed, compressed), weight, rtol=0, atol=0)


def test_quantized_weights_come_nearer_to_the_dense_outputs():
    weight, compressed, dense = data(4)
    hessian = (compressed.t() @ compressed).float()
    plain, aimed = (
        gptq(start.float(), hessian, [4], COLUMNS, activation_order=True, damping=DAMPING).weights[0].double()
        for start in (weight, target_of(weight, compressed, dense))
    )
    plain_error, error = ((q @ compressed.t() - weight @ dense.t()).square().sum() for q in (plain, aimed))
    assert error < 0.8 * plain_error


def test_a_dead_input_keeps_its_weights():
    weight, compressed, dense = data(5)
    compressed[:, 3] = 0
    target = target_of(weight, compressed, dense)
    assert torch.isfinite(target).all()
    torch.testing.assert_close(target[:, 3], weight[:, 3])


def test_the_type_of_the_weights_is_kept():
    weight, compressed, dense = data(6)
    assert target_of(weight.bfloat16(), compressed, dense).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_observes_both_models_side_by_side(name, tmp_path):
    """Against plain inputs of the layers, gathered by hooks over the whole block."""
    model = architectures.build(name)
    run = prepare(tmp_path / "run", model)
    blockwise = BlockwiseModel.from_folder(run.model, torch.device("cpu"))
    dense, inputs = embed(blockwise, architectures.tokens(SEQUENCES))
    hidden = dense + 0.1 * torch.randn(dense.shape, generator=torch.Generator().manual_seed(0))
    layers = layer_table(model)
    layers = layers[layers["block"] == 0]
    before, given = hidden.clone(), dense.clone()
    seen = observe_both(blockwise, 0, hidden, dense, inputs, layers, {})
    assert torch.equal(hidden, before) and torch.equal(dense, given)
    expected = observe_block(blockwise, 0, before.clone(), inputs, layers, outputs=True)
    for group in dict.fromkeys(layers["input_group"]):
        x, y = (inputs_of(blockwise, group, states, inputs) for states in (hidden, given))
        torch.testing.assert_close(seen.hessians[group], expected[group])
        torch.testing.assert_close(seen.deviations[group], (y - x).t() @ x, rtol=1e-4, atol=1e-4)


def inputs_of(model: BlockwiseModel, layer: str, hidden: Tensor, inputs) -> Tensor:
    gathered: list[Tensor] = []
    hook = model.blocks[0].get_submodule(layer).register_forward_pre_hook(lambda _, args: gathered.append(args[0]))
    model.run_block(0, hidden, inputs)
    hook.remove()
    return torch.cat([each.flatten(0, -2) for each in gathered])
