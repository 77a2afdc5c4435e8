"""Pure tensor maths of the advantage estimators: B completions by T tokens, masks with 1 = counts."""

from collections.abc import Callable

import torch
from torch import Tensor


def token_rewards(scores: Tensor, per_token_kl: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Reward of every token: -beta * KL of the token; the last token of a completion also gets the score.

    The sum over a row is score - beta * KL of the completion.

    Args:
        scores: Scores of the completions, (B,).
        per_token_kl: log pi - log pi_ref of every sampled token, (B, T).
        mask: Completion tokens, the first EOS included, (B, T).
        beta: Weight of the KL.

    Source: Huang et al. 2024 (2403.17031); Ziegler et al. 2019 (1909.08593), section 2.
    """
    rewards = -beta * per_token_kl * mask
    last = mask.sum(1).long() - 1
    rows = torch.nonzero(last >= 0).squeeze(1)  # a fully masked completion has no last token
    rewards[rows, last[rows]] += scores[rows]
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation for completions of different lengths; every completion ends in a terminal state.

    delta_t = r_t + gamma * V_{t+1} - V_t,   A_t = delta_t + gamma * lam * A_{t+1},   return_t = A_t + V_t,
    with V = A = 0 after a completion's last token, also if the length limit ended it.

    Args:
        rewards: (B, T).
        values: Value of the state in which token t was sampled, (B, T).
        mask: Completion tokens, (B, T); other tokens have no influence.
        gamma: Discount factor, 0..1.
        lam: 0 gives the one-step error, 1 the discounted return minus the value.

    Returns:
        Advantages and returns, both (B, T) and 0 outside the mask.

    Source: Schulman et al. 2016 (1506.02438), equation 16.
    """
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(values)
    next_advantage = next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def masked_whiten(
    x: Tensor, mask: Tensor, total: Callable[[Tensor], Tensor] = lambda sums: sums, center: bool = True
) -> Tensor:
    """Scales the entries where `mask` is 1 to variance 1 (biased) and, with `center`, to mean 0.

    Args:
        x: (B, T).
        mask: (B, T).
        total: Adds a tensor of sums up over all processes, so that all ranks have the same moments.
        center: True: subtracts the mean.

    Returns:
        (B, T), 0 outside the mask. A constant stays constant (0 with `center`).
    """
    count, sum_x = total(torch.stack([mask.sum().to(x.dtype), (x * mask).sum()]))
    mean = sum_x / count.clamp(min=1)
    # Squares of differences: a difference of squares loses all digits if the mean is large.
    variance = total(((x - mean).square() * mask).sum()) / count.clamp(min=1)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if center else whitened + mean) * mask


def leave_one_out(rewards: Tensor) -> Tensor:
    """For every completion, the mean reward of its prompt's other completions.

    Args:
        rewards: (P, G); NaN for a completion without a score, which is left out of the means.

    Returns:
        (P, G); NaN for a completion without a score, or without other completions that have one.

    Source: Kool et al. 2019 (Buy 4 REINFORCE samples), equation 6; Ahmadian et al. 2024 (2402.14740), equation 8.
    """
    scored = (~torch.isnan(rewards)).sum(1, keepdim=True)
    return (torch.nansum(rewards, 1, keepdim=True) - rewards) / (scored - 1)


def group_mean(rewards: Tensor) -> Tensor:
    """The mean reward of each prompt's completions, (P, G): leave-one-out times (G - 1) / G, as in GRPO."""
    return torch.nanmean(rewards, 1, keepdim=True).expand_as(rewards)


def batch_mean(rewards: Tensor) -> Tensor:
    """The mean reward of the whole rollout, (P, G)."""
    return torch.nanmean(rewards).expand_as(rewards)


BASELINES = {"leave_one_out": leave_one_out, "group_mean": group_mean, "batch_mean": batch_mean}
"""Name -> baseline that needs the rewards of one rollout only."""


class RunningMoments:
    """Mean and variance of all numbers added so far, except NaN, by Welford's update."""

    def __init__(self):
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    @property
    def std(self) -> float:
        """Population standard deviation; 1 if all numbers are equal."""
        return (self.squares / self.count) ** 0.5 if self.squares > 0 else 1.0

    def add(self, values: Tensor) -> None:
        values = values[~torch.isnan(values)].double()
        n = values.numel()
        if n == 0:
            return
        mean = values.mean().item()
        difference, total = mean - self.mean, self.count + n
        self.squares += (values - mean).square().sum().item() + difference**2 * self.count * n / total
        self.mean += difference * n / total
        self.count = total

    def normalized(self, values: Tensor, add: bool) -> Tensor:
        """(values - mean) / std; with `add`, after adding the values."""
        if add:
            self.add(values)
        return (values - self.mean) / self.std
