"""PPO: the rollouts and scores of `OnPolicyTrainer`, a learned value baseline, and advantages per token."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from rlhf_recipes.launch.setup import launched
from rlhf_recipes.models.dropout import switch_off
from rlhf_recipes.runs.files import VALUE_MODEL
from rlhf_recipes.trainers.advantages import gae, masked_whiten, token_rewards
from rlhf_recipes.trainers.config import OnPolicyConfig
from rlhf_recipes.trainers.metrics import in_float64
from rlhf_recipes.trainers.on_policy import OnPolicyTrainer
from rlhf_recipes.trainers.state import Forward, Rollout
from rlhf_recipes.trainers.value_network import ValueNetwork, copy_of_policy, load_value_model


@dataclass
class PPOConfig(OnPolicyConfig):
    """TRL's `RLOOConfig` and PPO's own settings; `epsilon` is the policy clip, `num_iterations` the epochs per rollout.

    Defaults that differ from TRL's are those of Huang et al. 2024 (2403.17031).
    """

    num_generations: int = field(default=1, metadata={"help": "Completions per prompt; PPO needs only one."})
    gamma: float = field(default=1.0, metadata={"help": "Discount factor per token."})
    lam: float = field(default=0.95, metadata={"help": "GAE: 0 trusts the value network, 1 the sampled return."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Largest change of a value within a rollout."})
    ent_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy bonus."})
    whiten_rewards: bool = field(
        default=False, metadata={"help": "Scale the rewards of all tokens to variance 1; their mean stays."}
    )
    whiten_advantages: bool = field(default=True, metadata={"help": "Mean 0 and variance 1 over the rollout's tokens."})
    value_warmup_steps: int = field(
        default=0, metadata={"help": "Number of first optimizer steps that train the value network only."}
    )

    def __post_init__(self):
        super().__post_init__()
        sharded = self.deepspeed_plugin is not None or self.fsdp_plugin_args or launched().kind == "FSDP"
        if self.value_warmup_steps > 0 and sharded:
            raise ValueError(
                f"value_warmup_steps is {self.value_warmup_steps}, but an optimizer step of DeepSpeed or FSDP changes all "
                "weights, also the policy's; set it to 0, or launch with DDP."
            )

    @property
    def needs_siblings(self) -> bool:
        return False


class PPOTrainer(OnPolicyTrainer):
    """Proximal policy optimization: clipped policy and value losses per token, advantages by GAE.

    It differs from `RLOOTrainer` in the advantages, which belong to tokens: the KL is a reward of each token, the score
    is a reward of the last token, and a value network is the baseline.

    Checkpoints and the final model have the policy as a plain causal language model, and the value network in the
    folder `value_model`.

    Args:
        model: The policy: Hub id, folder or instance.
        reward_funcs: As in TRL; a reward model is read at the token that it was trained on.
        args: Settings. None: the defaults.
        more: TRL's other arguments, in TRL's order: `train_dataset`, `eval_dataset`, `processing_class`, ...
        value_model: `shared` (a head on the policy), `policy` (a copy of the policy with a head), or a sequence
            classifier with the policy's tokenizer, as Hub id, folder or instance (which is copied).

    Source: Schulman et al. 2017 (1707.06347), equations 7 and 9; Huang et al. 2024 (2403.17031).
    """

    _name = "PPO"
    _tag_names = ["trl", "ppo"]
    _paper = {"title": "Proximal Policy Optimization Algorithms", "id": "1707.06347"}
    config_class = PPOConfig
    reshuffles = True

    def __init__(
        self, model: Any, reward_funcs: Any, args: PPOConfig | None = None, *more, value_model: Any = "shared", **kwargs
    ):
        super().__init__(model, reward_funcs, args, *more, **kwargs)
        ValueNetwork(self.model, self._separate_value_model(value_model))
        self.add_callback(_FreezePolicy(self))

    def _separate_value_model(self, source: str | PreTrainedModel) -> PreTrainedModel | None:
        if source == "shared":
            return None
        if source == "policy":
            model = copy_of_policy(self.model)
        else:
            model = load_value_model(source, self._tokenizer)
        if self.args.disable_dropout:
            switch_off(model)
        if self.args.gradient_checkpointing:
            model.gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)
        return model

    @property
    def value_network(self) -> ValueNetwork:
        return self.accelerator.unwrap_model(self.model).value_network

    @property
    def warming_up(self) -> bool:
        """Whether only the value network trains."""
        return self.state.global_step < self.args.value_warmup_steps

    def _forward(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, length: int, entropy: bool = False
    ) -> Forward:
        # The reference may be the policy without its adapter: then it has the hook, but needs no values.
        self.value_network.active = self._rollout is None or self._rollout.policy_pass is None
        return super()._forward(model, input_ids, attention_mask, length, entropy)

    def _add_advantages(self, output: dict[str, Tensor], rollout: Rollout) -> Tensor:
        mask, scores = output["completion_mask"], self._local_rows(rollout.scores)
        values = rollout.policy_pass.values * mask
        # Neither policy nor value network learns from a completion without a score.
        counts = mask * ~scores.isnan()[:, None]
        rewards = token_rewards(scores.nan_to_num(), rollout.kl, mask, self.beta)
        if self.args.whiten_rewards:
            rewards = masked_whiten(rewards, counts, total=self._sum_over_ranks, center=False)
        advantages, returns = gae(rewards, values, mask, self.args.gamma, self.args.lam)
        if self.args.whiten_advantages:
            advantages = masked_whiten(advantages, counts, total=self._sum_over_ranks)
        output["advantages"] = advantages * counts
        output["old_values"], output["returns"], output["loss_mask"] = values, returns, counts
        self._log_mean("value_mean", values, counts)
        self._log_mean("return_mean", returns, counts)
        for name, x in (("returns", returns), ("errors", returns - values)):  # `explained_variance` follows from these
            self._log_mean(f"{name}_1", x, counts)
            self._log_mean(f"{name}_2", in_float64(x).square(), counts)
        return self.accelerator.gather(output["advantages"].sum(1) / counts.sum(1).clamp(min=1))

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        self.value_network.detached = self.warming_up
        now = self._forward_batch(model, inputs, entropy=self.args.ent_coef != 0.0)
        mask, returns, old_values = inputs["loss_mask"], inputs["returns"], inputs["old_values"]

        log_ratio = (now.logps - inputs["old_per_token_logps"]) * mask
        policy_losses = self._clipped_losses(log_ratio, inputs["advantages"], mask)

        clip = self.args.cliprange_value
        clipped_values = old_values + (now.values - old_values).clamp(-clip, clip)
        value_losses = 0.5 * torch.max((now.values - returns).square(), (clipped_values - returns).square())

        policy_terms = policy_losses if now.entropies is None else policy_losses - self.args.ent_coef * now.entropies
        if self.warming_up:
            policy_terms = 0.0 * policy_terms  # DDP waits for a gradient of every parameter
        terms = policy_terms + self.args.vf_coef * value_losses
        # A mean over the tokens of the whole optimizer step. The trainer averages over micro-batches and processes, so
        # the sum is multiplied by their number.
        parts = self.accelerator.num_processes * (self.args.gradient_accumulation_steps if self.model.training else 1)
        loss = (terms * mask).sum() * parts / inputs["tokens_of_step"].clamp(min=1)

        self._log_mean("value_loss", value_losses, mask)
        self._log_mean("value_clip_fraction", ((now.values - old_values).abs() > clip).float(), mask)
        self._log_update(log_ratio, mask, moves=not self.warming_up)
        return self._with_aux_loss(loss, now)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        states = self.model.state_dict() if state_dict is None else state_dict
        ours = {name: states[name] for name in states if name.startswith("value_network.")}
        # An adapter's save picks its own tensors; a full model's save would also write the value network.
        rest = (
            None
            if is_peft_model(self.model) and state_dict is None
            else {k: v for k, v in states.items() if k not in ours}
        )
        super()._save(str(folder), rest)
        if self.args.should_save:
            states = {name.removeprefix("value_network."): tensor for name, tensor in ours.items()}
            self.value_network.save(folder / VALUE_MODEL, states, self._tokenizer)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.value_network.load(Path(resume_from_checkpoint) / VALUE_MODEL)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if not self.is_deepspeed_enabled:  # DeepSpeed has loaded all weights itself
            self.value_network.load(Path(self.state.best_model_checkpoint) / VALUE_MODEL)


class _FreezePolicy(TrainerCallback):
    """Removes the policy's gradients while the value network warms up: with 0, weight decay would change the policy."""

    def __init__(self, trainer: PPOTrainer):
        self._trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self._trainer.warming_up:
            for name, parameter in self._trainer.accelerator.unwrap_model(self._trainer.model).named_parameters():
                if not name.startswith("value_network."):
                    parameter.grad = None
