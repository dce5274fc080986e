"""Divergence and likelihood against plain float64 formulas."""

import pytest
import torch

from evopress.util import metrics

TOKENS, VOCABULARY = 37, 101


def _logits(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (3 * torch.randn(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(seed))).to(dtype)


def _plain_kl(teacher: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    p, q = teacher.double().softmax(-1), logits.double().softmax(-1)
    return (p * (p.log() - q.log())).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece", [1, 3 * VOCABULARY, 1 << 20])
def test_kl_equals_the_formula_in_float64(dtype, piece, monkeypatch):
    monkeypatch.setattr(metrics, "PIECE", piece)
    teacher, logits = _logits(0, dtype), _logits(1, dtype)
    torch.testing.assert_close(
        metrics.kl_per_token(teacher, logits).double(), _plain_kl(teacher, logits), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("piece", [1, 5 * VOCABULARY, 1 << 20])
def test_nll_equals_the_formula_in_float64(piece, monkeypatch):
    monkeypatch.setattr(metrics, "PIECE", piece)
    logits = _logits(2, torch.bfloat16)
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(3))
    plain = -logits.double().softmax(-1).log()[torch.arange(TOKENS), targets]
    torch.testing.assert_close(metrics.nll_per_token(logits, targets).double(), plain, rtol=1e-5, atol=1e-6)


def test_kl_of_a_model_with_itself_is_exactly_zero():
    logits = _logits(4)
    assert torch.equal(metrics.kl_per_token(logits, logits), torch.zeros(TOKENS))


def test_arguments_are_left_as_they_were():
    teacher, logits = _logits(5), _logits(6)
    metrics.kl_per_token(teacher, logits)
    metrics.nll_per_token(logits, torch.zeros(TOKENS, dtype=torch.int64))
    assert torch.equal(teacher, _logits(5)) and torch.equal(logits, _logits(6))


def test_extreme_logits_stay_finite_and_nan_is_passed_on():
    teacher = torch.zeros(2, VOCABULARY)
    teacher[0, 0] = 1e4
    logits = -teacher
    divergence = metrics.kl_per_token(teacher, logits)
    assert divergence[0] == pytest.approx(1e4, rel=1e-3) and divergence[1] == 0
    logits[1, 3] = float("nan")
    assert metrics.kl_per_token(teacher, logits).isnan().tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sharpness", [1.0, 4.0, 12.0], ids=["flat", "usual", "peaked"])
def test_kl_keeps_its_precision_over_a_large_vocabulary(dtype, sharpness):
    """Also where one token has nearly all mass, and where both models nearly agree (KL of 1e-4 nats and less)."""
    generator = torch.Generator().manual_seed(7)
    teacher = (sharpness * torch.randn(24, 49152, generator=generator)).to(dtype)
    near = (teacher.float() + 0.02 * torch.randn(teacher.shape, generator=generator)).to(dtype)
    far = (teacher.float() + 2 * torch.randn(teacher.shape, generator=generator)).to(dtype)
    shared = metrics.distribution(teacher)
    for logits in (near, far):
        plain = _plain_kl(teacher, logits)
        # float32 logarithms near 10 round by 1e-6 each; over the sum their errors average out to much less.
        torch.testing.assert_close(metrics.kl_divergence(shared, logits).double(), plain, rtol=1e-5, atol=2e-6)
        assert torch.equal(metrics.kl_per_token(teacher, logits), metrics.kl_divergence(shared, logits))


def test_positions_without_a_next_token_have_no_loss():
    targets = torch.full((TOKENS,), metrics.IGNORE)
    assert torch.equal(metrics.nll_per_token(_logits(2), targets), torch.zeros(TOKENS))
