"""RLOO: TRL's algorithm with `OnPolicyTrainer`, and the baselines that the paper compares it with."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from trl.trainer.utils import nanstd

from rlhf_recipes.trainers.advantages import BASELINES
from rlhf_recipes.trainers.config import OnPolicyConfig
from rlhf_recipes.trainers.on_policy import OnPolicyTrainer
from rlhf_recipes.trainers.state import Rollout


@dataclass
class RLOOConfig(OnPolicyConfig):
    """TRL's `RLOOConfig` and the choice of the baseline."""

    baseline: Literal["leave_one_out", "group_mean", "batch_mean", "moving_average", "constant", "none"] = field(
        default="leave_one_out",
        metadata={"help": "The value subtracted from a completion's reward. With none the algorithm is REINFORCE."},
    )
    baseline_value: float = field(default=0.0, metadata={"help": "The value of the baseline `constant`."})

    @property
    def needs_siblings(self) -> bool:
        return self.baseline in ("leave_one_out", "group_mean")


class RLOOTrainer(OnPolicyTrainer):
    """REINFORCE leave-one-out: a completion's advantage is its reward minus the mean of its prompt's other completions.

    The action is the whole completion: each completion has one clipped ratio, of summed log-probabilities. The KL is
    summed over tokens and is a part of the reward. Advantages are not normalized. Advantages and loss equal TRL's if
    `baseline` is `leave_one_out`. Other baselines are the mean of the prompt's completions (`group_mean`), of the
    rollout (`batch_mean`) or of all earlier rollouts (`moving_average`), `constant`, and `none`.

    Source: Ahmadian et al. 2024 (2402.14740), section 3.2.
    """

    _name = "RLOO"
    config_class = RLOOConfig

    def _add_advantages(self, output: dict[str, Tensor], rollout: Rollout) -> Tensor:
        rewards = rollout.scores
        if self.beta != 0.0:
            rewards = rewards - self.beta * self.accelerator.gather(rollout.kl.sum(-1))
        generations = self.num_generations if self.model.training else self.num_generations_eval
        grouped = rewards.view(-1, generations)
        if generations == 1 and self.args.needs_siblings:  # possible in evaluation
            baselines = grouped
        else:
            baselines = self._baselines(grouped)
        advantages = rewards - baselines.reshape(-1)
        if self.args.normalize_advantages:
            advantages = (advantages - torch.nanmean(advantages)) / (nanstd(advantages) + 1e-4)
        # The policy does not learn from a completion without a score or without a baseline.
        advantages = advantages.nan_to_num(nan=0.0)
        output["advantages"] = self._local_rows(advantages)
        no_signal = torch.isclose(advantages, torch.zeros_like(advantages)).view(-1, generations).all(1)
        self._log_mean("no_signal_fraction", no_signal.float(), same_everywhere=True)
        if no_signal.all():
            self._run_state.warn_once(
                "no signal", "All completions of each prompt have the same reward: there is nothing to learn."
            )
        self._log_mean("baseline_mean", baselines.nan_to_num(), (~baselines.isnan()).float(), same_everywhere=True)
        return advantages

    def _baselines(self, rewards: Tensor) -> Tensor:
        """The baseline of every completion, (P, G), as the rewards."""
        if self.args.baseline in BASELINES:
            return BASELINES[self.args.baseline](rewards)
        if self.args.baseline == "moving_average":
            seen = self._run_state.reward_moments
            mean = seen.mean if seen.count else torch.nanmean(rewards).item()
            if self.model.training:
                seen.add(rewards)
            return torch.full_like(rewards, mean)
        return torch.full_like(rewards, self.args.baseline_value if self.args.baseline == "constant" else 0.0)

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        mask = inputs["completion_mask"]
        now = self._forward_batch(model, inputs)
        log_ratio = (now.logps * mask).sum(1) - inputs["old_logps"]
        loss = self._clipped_losses(log_ratio, inputs["advantages"]).mean()
        self._log_update((now.logps - inputs["old_per_token_logps"]) * mask, mask)
        return self._with_aux_loss(loss, now)
