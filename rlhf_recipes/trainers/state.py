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
    """What an on-policy run carries from one rollout to the next, beside its weights, KL control and metrics."""

    episodes: int = 0
    """Completions sampled so far, over all processes."""
    warned_of: list[str] = field(default_factory=list)
    score_moments: RunningMoments = field(default_factory=RunningMoments)
    reward_moments: RunningMoments = field(default_factory=RunningMoments)

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"score_moments": vars(self.score_moments), "reward_moments": vars(self.reward_moments)}

    def load(self, saved: dict[str, Any]) -> None:
        self.episodes, self.warned_of = saved["episodes"], saved["warned_of"]
        vars(self.score_moments).update(saved["score_moments"])
        vars(self.reward_moments).update(saved["reward_moments"])
