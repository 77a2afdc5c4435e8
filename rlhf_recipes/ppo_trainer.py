"""PPO on TRL's `RLOOTrainer`: the same rollouts and scores, with a learned value baseline and credit per token."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import trl
from accelerate.utils import is_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import ModelOutput

from rlhf_recipes.advantages import gae, masked_mean, masked_whiten, token_rewards
from rlhf_recipes.on_policy import OnPolicyTrainer, Rollout

VALUE_HEAD_FILE = "value_head.safetensors"


@dataclass
class PPOConfig(trl.RLOOConfig):
    """TRL's `RLOOConfig` and PPO's own settings; `epsilon` is the policy clip, `num_iterations` the epochs per rollout.

    Defaults are those of Huang et al. 2024 (2403.17031), table 1, where they are not TRL's.
    """

    num_generations: int = field(default=1, metadata={"help": "Completions per prompt; PPO needs no second one."})
    disable_dropout: bool = field(default=True, metadata={"help": "Dropout makes the first ratio differ from 1."})
    gamma: float = field(default=1.0, metadata={"help": "Discount factor per token."})
    lam: float = field(default=0.95, metadata={"help": "GAE: 0 trusts the value network, 1 the sampled return."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    cliprange_value: float = field(default=0.2, metadata={"help": "How far a value may move from the rollout's."})
    whiten_advantages: bool = field(default=True, metadata={"help": "Mean 0, variance 1 over the rollout's tokens."})

    def __post_init__(self):
        try:
            super().__post_init__()
        except ValueError as error:
            # TRL's last check refuses one completion per prompt, which only a leave-one-out baseline needs to.
            if self.num_generations != 1 or "at least 2 generations" not in str(error):
                raise


@dataclass
class PolicyOutput(ModelOutput):
    """Logits (B, T, vocabulary) and values (B, T) of the same states, and a mixture of experts' balancing loss."""

    logits: Tensor | None = None
    state_values: Tensor | None = None
    aux_loss: Tensor | None = None


class ValueHead(nn.Module):
    """A scalar on the hidden state that goes into the LM head: the value of the state in which a token is sampled.

    It starts at 0 everywhere, so that the first advantages are plain returns instead of noise.

    Args:
        policy: The causal language model that it reads; its parameters become part of that model.
    """

    def __init__(self, policy: nn.Module):
        super().__init__()
        lm_head = policy.get_output_embeddings()
        self.linear = nn.Linear(lm_head.weight.shape[1], 1, dtype=torch.float32, device=policy.device)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self._hidden_states: Tensor | None = None
        # Inside the policy's own forward, and among its outputs: so DDP and DeepSpeed see a layer like any other.
        lm_head.register_forward_pre_hook(self._remember)
        policy.register_forward_hook(self._add_values, with_kwargs=True)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Values (B, T) of the states (B, T, hidden size), in float32."""
        # Not under autocast: in bf16 two neighbouring values differ by 1 %, as much as the advantages themselves.
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self.linear(hidden_states.to(self.linear.weight.dtype)).squeeze(-1).float()

    def _remember(self, lm_head: nn.Module, args: tuple) -> None:
        self._hidden_states = args[0]

    def _add_values(self, policy: nn.Module, args: tuple, kwargs: dict, outputs: ModelOutput) -> ModelOutput:
        hidden_states, self._hidden_states = self._hidden_states, None
        if kwargs.get("use_cache") is not False:
            return outputs  # generation, which needs no values, but every field of the model's own output
        return PolicyOutput(outputs.logits, self(hidden_states), getattr(outputs, "aux_loss", None))


class PPOTrainer(OnPolicyTrainer):
    """Proximal policy optimization: clipped policy and value losses per token, advantages by GAE.

    The one thing that differs from `RLOOTrainer` is where advantages come from, and that they belong to tokens: KL is
    a reward of each token, the score one of the last token, and a value head on the policy is the baseline.

    Checkpoints hold the policy as a plain causal language model, and the value head in a file of its own.

    Source: Schulman et al. 2017 (1707.06347), equations 7 and 9; Huang et al. 2024 (2403.17031).
    """

    _name = "PPO"
    _tag_names = ["trl", "ppo"]
    _paper = {"title": "Proximal Policy Optimization Algorithms", "id": "1707.06347"}

    def __init__(self, *args, **kwargs):
        self._values: list[Tensor] = []
        super().__init__(*args, **kwargs)
        self.model.add_module("value_head", ValueHead(self.model))

    @property
    def value_head(self) -> ValueHead:
        return self.accelerator.unwrap_model(self.model).value_head

    def _after_forward(self, outputs: ModelOutput) -> None:
        if isinstance(outputs, PolicyOutput):  # the reference has no values
            self._values.append(outputs.state_values[:, :-1])

    def _values_of_last_pass(self, passes: int = 1) -> Tensor:
        values, self._values = torch.cat(self._values[:passes]), []
        return values

    def _generate_and_score_completions(self, inputs):
        self._values = []
        return super()._generate_and_score_completions(inputs)

    def _finish_rollout(self, output: dict[str, Tensor], rollout: Rollout) -> dict[str, Tensor]:
        mask = output["completion_mask"]
        B = len(mask)
        # With an adapter switched off as reference, the same model did two passes: the first is the policy's.
        policy_passes = len(self._values) // (2 if self.beta != 0.0 and self.ref_model is None else 1)
        values = self._values_of_last_pass(policy_passes) * mask
        rank = self.accelerator.process_index
        scores = rollout.rewards_per_func[rank * B : (rank + 1) * B]
        unscored = scores.isnan().all(1)
        scores = (scores * self.reward_weights.to(scores.device)).nansum(1)
        if self.reward_clip_range:
            scores = scores.clamp(*self.reward_clip_range)
        rewards = token_rewards(scores, self._per_token_kl(rollout), mask, self.beta)
        advantages, returns = gae(rewards, values, mask, self.args.gamma, self.args.lam)
        # A completion to which no reward function applies teaches nothing: neither policy nor value may move on it.
        counts = mask * ~unscored[:, None]
        returns = torch.where(unscored[:, None], values, returns)
        self._log_tokens({"value_mean": values, "return_mean": returns}, counts)
        self._log_explained_variance(values, returns, counts)
        if self.args.whiten_advantages:
            advantages = masked_whiten(advantages, counts, total=self._sum_over_ranks)
        output["advantages"] = advantages * counts
        output["old_per_token_logps"] = rollout.per_token_logps[0]
        output["old_values"] = values
        output["returns"] = returns
        return output

    def _compute_loss(self, model, inputs):
        mask = inputs["completion_mask"]
        per_token_logps, entropies, aux_loss = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], mask], dim=1),
            logits_to_keep=mask.size(1),
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
        )
        values = self._values_of_last_pass()
        advantages, returns, old_values = inputs["advantages"], inputs["returns"], inputs["old_values"]

        log_ratio = (per_token_logps - inputs["old_per_token_logps"]) * mask
        ratio = log_ratio.exp()
        clipped_ratio = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        policy_losses = torch.max(-advantages * ratio, -advantages * clipped_ratio)

        clip = self.args.cliprange_value
        clipped_values = old_values + (values - old_values).clamp(-clip, clip)
        value_losses = 0.5 * torch.max((values - returns).square(), (clipped_values - returns).square())

        policy_loss, value_loss = masked_mean(policy_losses, mask), masked_mean(value_losses, mask)
        loss = policy_loss + self.args.vf_coef * value_loss
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss

        with torch.no_grad():
            self._log_tokens(
                {
                    "policy_loss": policy_losses,
                    "value_loss": value_losses,
                    "entropy": entropies,
                    "ratio": ratio,
                    "approx_kl": ratio - 1 - log_ratio,  # k3, never negative: joschu.net/blog/kl-approx.html
                    "clip_fraction": (-advantages * clipped_ratio > -advantages * ratio).float(),
                    "value_clip_fraction": ((values - old_values).abs() > clip).float(),
                },
                mask,
            )
        return loss

    def _log_tokens(self, values: dict[str, Tensor], mask: Tensor) -> None:
        """Log means over all tokens of all processes, each value (B, T)."""
        mode = "train" if self.model.training else "eval"
        sums = self._sum_over_ranks(
            torch.stack([*((x * mask).sum().float() for x in values.values()), mask.sum().float()])
        )
        for name, total in zip(values, sums[:-1].tolist(), strict=True):
            self._metrics[mode][name].append(total / max(sums[-1].item(), 1.0))

    def _log_explained_variance(self, values: Tensor, returns: Tensor, mask: Tensor) -> None:
        """Log 1 - Var(returns - values) / Var(returns): 1 is a perfect value head, 0 one that knows only the mean."""
        mode = "train" if self.model.training else "eval"
        n, *sums = self._sum_over_ranks(
            torch.stack(
                [mask.sum().float(), *((x * mask).sum() for e in (returns, returns - values) for x in (e, e.square()))]
            )
        ).tolist()
        of_returns, of_errors = (sums[i + 1] / max(n, 1) - (sums[i] / max(n, 1)) ** 2 for i in (0, 2))
        self._metrics[mode]["explained_variance"].append(
            1 - of_errors / of_returns if of_returns > 1e-12 else float("nan")
        )

    def _sum_over_ranks(self, sums: Tensor) -> Tensor:
        return self.accelerator.reduce(sums, reduction="sum")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        states = self.model.state_dict() if state_dict is None else state_dict
        head = {name: states[name] for name in states if name.startswith("value_head.")}
        # An adapter's own save picks its tensors itself; a full model's would write the head among the policy's.
        rest = (
            None
            if is_peft_model(self.model) and state_dict is None
            else {k: v for k, v in states.items() if k not in head}
        )
        super()._save(str(folder), rest)
        if self.args.should_save:
            save_file({name: tensor.contiguous().cpu() for name, tensor in head.items()}, folder / VALUE_HEAD_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        states = load_file(Path(resume_from_checkpoint) / VALUE_HEAD_FILE)
        self.value_head.load_state_dict({name.removeprefix("value_head."): tensor for name, tensor in states.items()})
