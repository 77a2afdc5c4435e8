"""What PPO and RLOO share on top of TRL's `RLOOTrainer`: the same forward, texts, score and metric names for both."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import trl
from torch import Tensor
from trl.data_utils import is_conversational
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from rlhf_recipes.forward import completion_logits
from rlhf_recipes.models import continuation

METRIC_NAMES = {
    "reward": "score_mean",
    "reward_std": "score_std",
    "kl": "kl_per_token",
    "kl_of_sequence": "kl",
    "completions/mean_length": "length_mean",
    "completions/min_length": "length_min",
    "completions/max_length": "length_max",
    "num_tokens": "tokens",
    "clip_ratio/region_mean": "clip_fraction",
    "frac_reward_zero_std": "no_signal_fraction",
}
"""TRL's name of a metric -> ours, the same for both algorithms; `rewards/NAME/mean` becomes `score/NAME`.

`kl_of_sequence` is not TRL's: its `kl` is a mean over tokens, ours a sum over the completion.
"""

LEFT_OUT = ("clip_ratio/", "completions/", "step_time")
"""Beginnings of TRL's names that say nothing which ours do not."""


@dataclass
class Rollout:
    """What one rollout gave that TRL does not put into the batch; B completions of this process, T tokens."""

    per_token_logps: list[Tensor] = field(default_factory=list)
    """Of the policy, then (with beta > 0) of the reference, (B, T) each."""
    rewards_per_func: Tensor | None = None
    """What each reward function said about the completions of all processes, (processes * B, functions); NaN = None."""


class OnPolicyTrainer(trl.RLOOTrainer):
    """TRL's `RLOOTrainer` with four changes that both algorithms need.

    1. Log-probabilities are computed at the positions that completions were sampled at (`completion_logits`); TRL's
       are not where a model has learned positions (GPT-2) and the prompt is padded.
    2. Completions are decoded together with their prompt, so that `prompt + completion` is the text that was sampled,
       also with tokenizers whose decoder drops a leading blank.
    3. Reward functions are told which completions are `finished` (ended with EOS instead of being cut off).
    4. Metrics have one set of names; see `METRIC_NAMES`.
    """

    def __init__(self, *args, **kwargs):
        self._rollout: Rollout | None = None
        super().__init__(*args, **kwargs)
        if self._is_vlm:
            raise ValueError(
                f"{type(self).__name__} trains on text only; {type(self.processing_class).__name__} is a multimodal processor."
            )

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        **multimodal,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities of the last `logits_to_keep` tokens, (B, T); the parameters are TRL's."""
        logps, entropies, aux_losses = [], [], []
        more = {"output_router_logits": True} if compute_aux_loss else {}
        for rows in torch.arange(len(input_ids), device=input_ids.device).split(batch_size or len(input_ids)):
            with self.accelerator.autocast():
                logits, outputs = completion_logits(
                    model, input_ids[rows], attention_mask[rows], logits_to_keep, self.temperature, **more
                )
            logps.append(selective_log_softmax(logits, input_ids[rows, -logits_to_keep:]))
            if compute_entropy:
                with torch.no_grad():
                    entropies.append(entropy_from_logits(logits))
            if compute_aux_loss:
                aux_losses.append(outputs.aux_loss)
            self._after_forward(outputs)
        if self._rollout is not None:
            self._rollout.per_token_logps.append(torch.cat(logps))
        return (
            torch.cat(logps),
            torch.cat(entropies) if compute_entropy else None,
            torch.stack(aux_losses).mean() if compute_aux_loss else None,
        )

    def _after_forward(self, outputs) -> None:
        """Called with the model's outputs after every forward pass; PPO collects its values here."""

    def _generate(self, prompts: list):
        prompt_ids, completion_ids, completions = super()._generate(prompts)
        if not is_conversational({"prompt": prompts[0]}):
            completions = [continuation(self._tokenizer, p, c) for p, c in zip(prompt_ids, completion_ids, strict=True)]
        return prompt_ids, completion_ids, completions

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        finished = [bool(ids) and ids[-1] in self.eos_token_ids for ids in completion_ids_list]
        inputs = [example | {"finished": ended} for example, ended in zip(inputs, finished, strict=True)]
        self._log("eos_rate", torch.tensor(finished, dtype=torch.float32, device=self.accelerator.device))
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._rollout.rewards_per_func = rewards_per_func
        return rewards_per_func

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        self._rollout = Rollout()
        output = super()._generate_and_score_completions(inputs)
        mask = output["completion_mask"]
        self._log("kl_of_sequence", (self._per_token_kl(self._rollout) * mask).sum(1))
        rollout, self._rollout = self._rollout, None
        return self._finish_rollout(output, rollout)

    def _finish_rollout(self, output: dict[str, Tensor], rollout: Rollout) -> dict[str, Tensor]:
        """Last change to the batch before it is cut into mini-batches; RLOO makes none."""
        return output

    def _per_token_kl(self, rollout: Rollout) -> Tensor:
        """log pi - log pi_ref of every sampled token, (B, T): the k1 estimate. 0 without a reference (beta = 0)."""
        policy = rollout.per_token_logps[0]
        return policy - rollout.per_token_logps[1] if self.beta != 0.0 else torch.zeros_like(policy)

    def _log(self, name: str, values: Tensor) -> None:
        """Log the mean over all processes of one number per completion, (B,)."""
        mode = "train" if self.model.training else "eval"
        self._metrics[mode][name].append(self.accelerator.gather(values.detach().float()).mean().item())

    def episodes(self) -> int:
        """Completions sampled so far for training, over all processes."""
        steps_per_rollout = self.args.steps_per_generation * self.num_iterations / self.args.gradient_accumulation_steps
        rollouts = -(-self.state.global_step // steps_per_rollout)
        return int(min(rollouts, self.state.max_steps / steps_per_rollout) * self.args.generation_batch_size)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name in list(metrics):
            values = metrics.pop(name)
            if all(math.isnan(value) for value in values):
                continue  # undefined in every batch, such as the mean of a function that never applied
            if name in METRIC_NAMES:
                metrics[METRIC_NAMES[name]] = values
            elif name.startswith("rewards/"):
                _, function, statistic = name.split("/", 2)
                metrics[f"score/{function}" + ("" if statistic == "mean" else f"/{statistic}")] = values
            elif not name.startswith(LEFT_OUT):
                metrics[name] = values
        if self.model.training:
            logs["episodes"] = self.episodes()
        super().log(logs, start_time)

    def sampled_completions(self, number: int) -> list[dict[str, Any]]:
        """The first `number` completions of the last rollout, with their scores and advantages."""
        names = list(self._logs["rewards"])
        columns = [
            self._logs["prompt"],
            self._logs["completion"],
            self._logs["advantages"],
            *self._logs["rewards"].values(),
        ]
        return [
            {
                "step": self.state.global_step,
                "prompt": prompt,
                "completion": completion,
                "advantage": advantage,
                "scores": {name: None if value != value else value for name, value in zip(names, values, strict=True)},
            }
            for prompt, completion, advantage, *values in list(zip(*columns, strict=True))[:number]
        ]
