"""KL estimators against the exact KL, and the controllers by hand."""

import pytest
import torch

from rlhf_recipes.trainers.kl import ESTIMATORS, adapted_beta, adapted_lr_factor


def exact_and_expected(scale):
    """Exact KL of two distributions, and the expectation of each estimator over samples of the first."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 30, generator=generator, dtype=torch.float64)
    log_p, log_q = logits[0].log_softmax(0), (logits[0] + scale * logits[1]).log_softmax(0)
    p, d = log_p.exp(), log_p - log_q
    return (p * d).sum().item(), {name: (p * estimate(d)).sum().item() for name, estimate in ESTIMATORS.items()}


def test_k1_and_k3_are_unbiased_and_k2_nearly_for_near_distributions():
    for scale in (0.1, 1.0):
        exact, expected = exact_and_expected(scale)
        assert expected["k1"] == pytest.approx(exact, rel=1e-9) and expected["k3"] == pytest.approx(exact, rel=1e-9)
    exact, expected = exact_and_expected(0.1)
    assert expected["k2"] == pytest.approx(exact, rel=0.05) and expected["k2"] != pytest.approx(exact, rel=1e-6)


def test_k2_and_k3_are_never_negative_and_vary_less_than_k1():
    d = torch.linspace(-2, 2, 101)
    assert (ESTIMATORS["k2"](d) >= 0).all() and (ESTIMATORS["k3"](d) >= 0).all() and (ESTIMATORS["k1"](d) < 0).any()
    near = 0.1 * torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    assert ESTIMATORS["k3"](near).std() < 0.2 * ESTIMATORS["k1"](near).std()


def test_k3_keeps_its_digits_for_tiny_differences():
    assert ESTIMATORS["k3"](torch.tensor(1e-4)).item() == pytest.approx(5e-9, rel=0.2)


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(6.0, 1.0), (6.6, 1 + 0.1 * 256 / 10_000), (60.0, 1 + 0.2 * 256 / 10_000), (0.0, 1 - 0.2 * 256 / 10_000),
     (-3.0, 1 - 0.2 * 256 / 10_000)],
)  # fmt: skip
def test_adapted_beta_by_hand(kl, factor):
    """The numbers of Ziegler et al. 2019: target 6, horizon 10,000, batch 256."""
    assert adapted_beta(0.2, kl, target=6.0, horizon=10_000, episodes=256) == pytest.approx(0.2 * factor)


def test_adapted_lr_factor_by_hand():
    assert adapted_lr_factor(1.0, kl=0.021, target=0.01) == pytest.approx(1 / 1.5)
    assert adapted_lr_factor(1.0, kl=0.004, target=0.01) == pytest.approx(1.5)
    assert adapted_lr_factor(1.0, kl=0.012, target=0.01) == 1.0
    assert adapted_lr_factor(0.011, kl=1.0, target=0.01) == 0.01 and adapted_lr_factor(9.0, kl=0.0, target=0.01) == 10.0
