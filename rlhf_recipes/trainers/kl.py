"""KL to the reference: estimators per token, and the two ways to keep it near a target. Pure numbers."""

import torch
from torch import Tensor


def k1(log_ratio: Tensor) -> Tensor:
    """log pi - log pi_ref: unbiased, of high variance, negative for single tokens."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """Half the squared log ratio: biased, of low variance, never negative."""
    return 0.5 * log_ratio.square()


def k3(log_ratio: Tensor) -> Tensor:
    """pi_ref / pi - 1 + log pi - log pi_ref: unbiased, of low variance, never negative."""
    return torch.expm1(-log_ratio) + log_ratio


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
"""Name -> estimator of KL(pi || pi_ref), elementwise on log pi - log pi_ref of tokens that pi sampled.

Source: Schulman 2020, joschu.net/blog/kl-approx.html.
"""


def adapted_beta(beta: float, kl: float, target: float, horizon: float, episodes: int) -> float:
    """The KL weight for the next rollout: a proportional controller whose error is clipped to +-0.2.

    beta * (1 + clip(kl / target - 1, -0.2, 0.2) * episodes / horizon)

    Args:
        beta: The weight so far.
        kl: Measured KL of the last rollout, in nats a completion.
        target: KL to keep, in nats a completion.
        horizon: Episodes over which an error of 0.2 changes the weight by 20 %.
        episodes: Completions of the last rollout.

    Source: Ziegler et al. 2019 (1909.08593), section 2.2.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * episodes / horizon)


def adapted_lr_factor(factor: float, kl: float, target: float) -> float:
    """What the learning rate is multiplied with, so that the policy moves by about `target` in each rollout.

    Divided by 1.5 when the policy moved more than twice as far, times 1.5 when less than half as far; kept within
    0.01..10, so that no run of luck takes the learning rate out of reach.

    Args:
        factor: The factor so far.
        kl: KL to the rollout's policy in the rollout's last optimizer step, in nats a token.
        target: The same, as it should be.

    Source: Schulman et al. 2017 (1707.06347), section 4 (there for the penalty's weight); rsl_rl's "adaptive" schedule.
    """
    if kl > 2 * target:
        factor /= 1.5
    elif kl < target / 2:
        factor *= 1.5
    return min(max(factor, 0.01), 10.0)
