"""REINFORCE with the mean of the batch as baseline, as a file of `trainers/`."""

from dataclasses import dataclass, field

from rlhf_recipes.trainers.config import OnPolicyConfig
from rlhf_recipes.trainers.on_policy import OnPolicyTrainer


@dataclass
class ReinforceConfig(OnPolicyConfig):
    """Settings that the algorithms share, and the weight of the baseline."""

    baseline_weight: float = field(default=1.0, metadata={"help": "0 is plain REINFORCE."})

    @property
    def needs_siblings(self) -> bool:
        return False


class ReinforceTrainer(OnPolicyTrainer):
    """REINFORCE: every completion's reward minus the mean reward of its batch."""

    _name = "REINFORCE"
    config_class = ReinforceConfig

    def _add_advantages(self, output, rollout):
        rewards = rollout.scores - self.beta * self.accelerator.gather(rollout.kl.sum(1))
        advantages = rewards - self.args.baseline_weight * rewards.mean()
        output["advantages"] = self._local_rows(advantages)
        return advantages

    def _compute_loss(self, model, inputs):
        mask = inputs["completion_mask"]
        now = self._forward_batch(model, inputs)
        self._log_update((now.logps - inputs["old_per_token_logps"]) * mask, mask)
        return -(inputs["advantages"] * (now.logps * mask).sum(1)).mean()
