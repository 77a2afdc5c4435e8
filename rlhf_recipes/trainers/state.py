"""What an on-policy trainer keeps: one forward pass, one rollout, and what a run carries between rollouts."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rlhf_recipes.trainers.advantages import RunningMoments


@dataclass
class Forward:
    """What a forward pass says about the sampled tokens, (B, T) each; entropies and values where there are any."""

    logps: Tensor
    entropies: Tensor | None
    values: Tensor | None
    aux_loss: Tensor | None


@dataclass
class Rollout:
    """One rollout on its way from sampling to advantages; B completions of this process, N of all processes."""

    policy_pass: Forward | None = None
    """The policy's pass over the rollout."""
    ref_pass: Forward | None = None
    """The reference's; None with beta = 0."""
    finished: Tensor | None = None
    """Which completions ended with EOS, (N,)."""
    rewards_per_func: Tensor | None = None
    """What each reward function says, (N, functions); NaN = it does not apply."""
    scores: Tensor | None = None
    """Their weighted sum after missing_eos, normalization and clipping, (N,); NaN = no function applies."""
    kl: Tensor | None = None
    """KL estimate of every token, (B, T), 0 outside of completions and without a reference."""


@dataclass
class RunState:
    """What an on-policy run carries from one rollout to the next, beside weights, optimizer and random numbers."""

    beta: float
    episodes: int = 0
    episodes_logged: int = 0
    lr_factor: float = 1.0
    step_kl: Tensor | None = None
    """Sum of KL to the rollout's policy over the last optimizer step's tokens of this process, and their number."""
    kl_sums: list[list[float]] = field(default_factory=list)
    """Of the last rollouts: completions, sum and sum of squares of their KL to the reference."""
    warned_of: list[str] = field(default_factory=list)
    score_moments: RunningMoments = field(default_factory=RunningMoments)
    reward_moments: RunningMoments = field(default_factory=RunningMoments)
    sums: dict[str, dict[str, Tensor]] = field(default_factory=lambda: {"train": {}, "eval": {}})
    """Of every metric since the last line: the sum of its values on this process, and of their weights."""

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"score_moments": vars(self.score_moments), "reward_moments": vars(self.reward_moments)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunState":
        state = cls(**values)
        for name in ("score_moments", "reward_moments"):
            moments = RunningMoments()
            vars(moments).update(values[name])
            setattr(state, name, moments)
        return state
