"""The KL to the reference: estimators, and the control of beta and of the learning rate."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def k1(log_ratio: Tensor) -> Tensor:
    """log pi - log pi_ref: unbiased, high variance, may be negative for a token."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """Half the squared log ratio: biased, low variance, never negative."""
    return 0.5 * log_ratio.square()


def k3(log_ratio: Tensor) -> Tensor:
    """pi_ref / pi - 1 + log pi - log pi_ref: unbiased, low variance, never negative."""
    return torch.expm1(-log_ratio) + log_ratio


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
"""Name -> estimator of KL(pi || pi_ref), elementwise on log pi - log pi_ref of tokens that pi sampled.

Source: Schulman 2020, joschu.net/blog/kl-approx.html.
"""


def adapted_beta(beta: float, kl: float, target: float, horizon: float, episodes: int) -> float:
    """The next rollout's beta, from a proportional controller with an error clipped to +-0.2.

    beta * (1 + clip(kl / target - 1, -0.2, 0.2) * episodes / horizon)

    Args:
        beta: The last rollout's beta.
        kl: KL of the last rollout, in nats per completion.
        target: Target of that KL.
        horizon: Episodes in which an error of 0.2 changes beta by 20 %.
        episodes: Completions of the last rollout.

    Source: Ziegler et al. 2019 (1909.08593), section 2.2.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * episodes / horizon)


def adapted_lr_factor(factor: float, kl: float, target: float) -> float:
    """The next rollout's factor on the learning rate, so that each rollout moves the policy by about `target`.

    It is divided by 1.5 if the policy moved more than twice as far, and multiplied by 1.5 if it moved less than half as
    far. It stays within 0.01..10.

    Args:
        factor: The last rollout's factor.
        kl: KL to the rollout's policy in the rollout's last optimizer step, in nats per token.
        target: Target of that KL.

    Source: Schulman et al. 2017 (1707.06347), section 4 (there for the penalty's weight); rsl_rl's "adaptive" schedule.
    """
    if kl > 2 * target:
        factor /= 1.5
    elif kl < target / 2:
        factor *= 1.5
    return min(max(factor, 0.01), 10.0)


def kl_metrics(log_ratio: Tensor) -> dict[str, Tensor]:
    """Metric -> its values, of completions (B,) or of tokens (B, T).

    Args:
        log_ratio: log pi - log pi_ref, 0 outside of completions, (B, T).
    """
    cautious = k3(log_ratio)
    return {
        "kl": log_ratio.sum(1),
        "kl_per_token": log_ratio,
        "kl_k3": cautious.sum(1),
        "kl_k3_per_token": cautious,
    }


ROUNDING = 1e-12
"""KL of a token, in nats, that two equal policies may have by rounding in float32."""


class KLControl:
    """Estimates the KL penalty, watches the KL, and adapts beta and the learning rate to their targets.

    Args:
        args: The trainer's settings: `beta`, `kl_estimator`, `kl_target`, `kl_horizon`, `lr_kl_target`.
    """

    def __init__(self, args: Any):
        self._args = args
        self.lr_factor = 1.0
        self.step_kl: Tensor | None = None
        """The last optimizer step on this process: sum of the tokens' KL to the rollout's policy, number of tokens."""
        self.kl_sums: list[list[float]] = []
        """For each of the last rollouts: number of completions, sum and sum of squares of their KL to the reference."""

    def penalty(self, log_ratio: Tensor, mask: Tensor) -> Tensor:
        """The KL estimate of every token, not weighted by beta, (B, T), from log pi - log pi_ref."""
        return ESTIMATORS[self._args.kl_estimator](log_ratio) * mask

    def watch(self, log_ratio: Tensor, sum_over_ranks: Callable[[Tensor], Tensor]) -> str | None:
        """Adds a rollout's KL; returns a sentence if the mean is negative, which a KL cannot be.

        Args:
            log_ratio: log pi - log pi_ref, 0 outside of completions, (B, T).
            sum_over_ranks: Adds a tensor up over all processes.
        """
        sums = log_ratio.sum(1)
        n, total, squares = sum_over_ranks(
            torch.stack([torch.ones_like(sums).sum(), sums.sum(), sums.square().sum()])
        ).tolist()
        self.kl_sums = (self.kl_sums + [[n, total, squares]])[-20:]
        seen, mean, square = (sum(column) for column in zip(*self.kl_sums, strict=True))
        mean, square = mean / seen, square / seen
        error = math.sqrt(max(square - mean**2, 0.0) / seen)
        if mean < -0.01 and mean < -4 * error:
            return f"the mean KL of the last {len(self.kl_sums)} rollouts is negative: {mean:.2g} nats per completion"
        return None

    def next_beta(self, beta: float, episodes: int) -> float:
        """Beta after a rollout of this many completions, moved towards `kl_target`."""
        if self._args.kl_target is None:
            return beta
        n, total, _ = self.kl_sums[-1]
        return adapted_beta(beta, total / n, self._args.kl_target, self._args.kl_horizon, episodes)

    def add_step_kl(self, moved: Tensor, mask: Tensor) -> None:
        """Adds a micro-batch to the optimizer step's KL to the rollout's policy, of every token, (B, T)."""
        sums = torch.stack([(moved * mask).sum(), mask.sum().float()])
        self.step_kl = sums if self.step_kl is None else self.step_kl + sums

    def adapt_learning_rate(self, optimizer: Any, scheduler: Any, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Adapts the learning rate, so that the last step of a rollout ends near `lr_kl_target`."""
        if self._args.lr_kl_target is None or self.step_kl is None:
            return
        total, tokens = sum_over_ranks(self.step_kl).tolist()
        if total <= ROUNDING * tokens:
            return  # the policy has not moved, whatever the learning rate is: no scores differ
        before = self.lr_factor
        self.lr_factor = adapted_lr_factor(before, total / tokens, self._args.lr_kl_target)
        change = self.lr_factor / before
        # The scheduler's base learning rate is in checkpoints; scaling it leaves warm-up and decay unchanged.
        scheduler = getattr(scheduler, "scheduler", scheduler)
        scheduler.base_lrs = [lr * change for lr in scheduler.base_lrs]
        scheduler._last_lr = [lr * change for lr in scheduler.get_last_lr()]
        for group in optimizer.param_groups:
            group["lr"] *= change

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_args"}

    def load(self, saved: dict[str, Any]) -> None:
        vars(self).update(saved)
