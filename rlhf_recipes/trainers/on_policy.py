"""What PPO and RLOO share on top of TRL's `RLOOTrainer`: all but where advantages come from and what the loss is."""

import copy
import logging
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl
from accelerate.utils import gather_object, is_peft_model, set_seed
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.data_utils import is_conversational
from trl.models import prepare_deepspeed, prepare_fsdp, unwrap_model_for_generation
from trl.trainer.utils import disable_dropout_in_model

from rlhf_recipes.data.tokenizer import continuation
from rlhf_recipes.models.forward import completion_logits, longest, sampled_logps
from rlhf_recipes.models.sampling import sample_completions
from rlhf_recipes.rewards.calls import RewardError, call_all, checked
from rlhf_recipes.rewards.functions import apply_missing_eos, as_reward_func
from rlhf_recipes.runs.checkpoints import Resumable
from rlhf_recipes.runs.trackers import as_cell, as_table
from rlhf_recipes.trainers.batches import EpochSampler, micro_batches
from rlhf_recipes.trainers.config import OnPolicyConfig, distortions
from rlhf_recipes.trainers.kl import ESTIMATORS, adapted_beta, adapted_lr_factor, k3
from rlhf_recipes.trainers.kl_diagnosis import kl_suspects
from rlhf_recipes.trainers.state import Forward, Rollout, RunState
from rlhf_recipes.trainers.vllm import send_policy_only

logger = logging.getLogger(__name__)

METRIC_NAMES = {
    "reward": "score_mean",
    "reward_std": "score_std",
    "completions/mean_length": "length_mean",
    "completions/min_length": "length_min",
    "completions/max_length": "length_max",
    "num_tokens": "tokens",
}
"""TRL's name of a metric -> ours, the same for both algorithms; `rewards/NAME/mean` becomes `score/NAME`."""

LEFT_OUT = ("clip_ratio", "completions", "step_time", "kl", "frac_reward_zero_std")
"""First parts of TRL's names that say nothing which ours do not."""

PHASES = ("generate", "score", "forward", "update")
"""Where time goes: sampling, reward functions, passes without gradient, passes with gradient and optimizer steps."""

TABLES, TABLE_ROWS = 20, 64
"""W&B: tables of completions that a run logs, evenly over its steps, and completions in each."""

STATE_FILE = "on_policy_{rank}.pt"
"""In a checkpoint, what a rank needs to go on exactly where it stopped."""


class OnPolicyTrainer(Resumable, trl.RLOOTrainer):
    """TRL's `RLOOTrainer`, with what an exact comparison of algorithms needs.

    1. Log-probabilities are computed at the positions that completions were sampled at (`completion_logits`); TRL's
       are not where a model has learned positions (GPT-2) and the prompt is padded.
    2. Completions are decoded together with their prompt, so that `prompt + completion` is the text that was sampled,
       also with tokenizers whose decoder drops a leading blank.
    3. Reward functions are told which completions are `finished` (ended with EOS instead of being cut off); what is
       wrong with one, on any process, stops all processes with its message.
    4. An optimizer step is one batch, however many micro-batches and processes it is cut into; micro-batches hold
       completions of similar length, without their common padding.
    5. A checkpoint holds everything that a run consists of, also in the middle of a rollout.
    6. Metrics have one set of names; see the README.

    A subclass fills in the advantages and the loss.
    """

    config_class: type[OnPolicyConfig]
    reshuffles = False
    """Whether each pass over a rollout draws its batches anew; TRL's RLOO draws them once."""

    def __init__(
        self,
        model: str | nn.Module,
        reward_funcs: Any,
        args: OnPolicyConfig | None = None,
        *more,
        peft_config: Any = None,
        reward_processing_classes: Any = None,
        **kwargs,
    ):
        if args is None:
            args = self.config_class(f"{Path(model if isinstance(model, str) else 'model').name}-{self._name}")
        if not isinstance(args, self.config_class):
            raise TypeError(f"{type(self).__name__} takes a {self.config_class.__name__}, not {type(args).__name__}.")
        self._state = RunState(beta=args.beta)
        self._rollout: Rollout | None = None
        self._batch: dict[str, Tensor] | None = None
        self._order: Tensor | None = None
        self._micro_batches: list[dict[str, Tensor]] = []
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._since: float | None = None
        self._charted, self._tabled = set(), -1
        # An instance may hold other weights than its name's on the Hub: its reference is a copy of the instance.
        reference = None
        whole = isinstance(model, nn.Module) and peft_config is None and not is_peft_model(model)
        if whole and args.beta != 0.0 and not args.sync_ref_model:
            reference, args.beta = copy.deepcopy(model).requires_grad_(False), 0.0
        super().__init__(
            model, self._as_reward_funcs(reward_funcs, reward_processing_classes, args), args, *more,
            peft_config=peft_config, **kwargs
        )  # fmt: skip
        self.beta = args.beta = self._state.beta
        if reference is not None:
            self.ref_model = self._prepare_reference(reference)
        if self.use_vllm:
            send_policy_only(self)
        if self._is_vlm:
            raise ValueError(
                f"{type(self).__name__} trains on text only; {type(self.processing_class).__name__} is a multimodal processor."
            )
        if self.distortions and not args.allow_truncated_sampling:
            raise ValueError(
                f"The model's generation_config has {', '.join(self.distortions)}: completions would not come from the "
                "policy's own distribution, so that ratios and KL are wrong. Take it out of generation_config.json, or "
                "set allow_truncated_sampling=True if you mean it."
            )

    @staticmethod
    def _as_reward_funcs(reward_funcs: Any, tokenizers: Any, args: OnPolicyConfig) -> list:
        functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        tokenizers = tokenizers if isinstance(tokenizers, list) else [tokenizers] * len(functions)
        made = [as_reward_func(f, t) for f, t in zip(functions, tokenizers, strict=True)]
        return [checked(f, f.__name__, may_skip=True, timeout=args.reward_timeout) for f in made]

    def _prepare_reference(self, model: nn.Module) -> nn.Module:
        if self.args.disable_dropout:
            disable_dropout_in_model(model)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(model, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    @property
    def distortions(self) -> list[str]:
        """Generation settings in force under which tokens do not come from the policy's own distribution."""
        if self.use_vllm:  # it takes none but the trainer's arguments
            return distortions({name: getattr(self.args, name) for name in ("top_p", "top_k", "min_p")})
        ours = {name: value for name, value in self.generation_config.to_dict().items() if value is not None}
        return distortions(self.accelerator.unwrap_model(self.model).generation_config.to_dict() | ours)

    # Sampling and scoring

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        self._book("update")
        if self.model.training:
            self._adapt_learning_rate()
        self._rollout = Rollout()
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:  # also when a reward function raises: the trainer may go on from a checkpoint
            rollout, self._rollout = self._rollout, None
        output["old_per_token_logps"] = rollout.policy_pass.logps
        rollout.scores = self._shape_scores(rollout)
        self._measure_kl(output, rollout)
        self._mean("entropy", rollout.policy_pass.entropies, output["completion_mask"])
        advantages = self._add_advantages(output, rollout)
        for _ in range(min(len(advantages), len(self._logs["advantages"]))):
            self._logs["advantages"].pop()  # TRL's own
        self._logs["advantages"].extend(advantages.tolist())
        if self.model.training:
            self._state.episodes += len(rollout.scores)
            self._adapt_beta(len(rollout.scores))
        self._book("forward")
        return output

    def _generate(self, prompts: list):
        prompt_ids, completion_ids, completions = super()._generate(prompts)
        if not is_conversational({"prompt": prompts[0]}):
            completions = [continuation(self._tokenizer, p, c) for p, c in zip(prompt_ids, completion_ids, strict=True)]
        self._book("generate")
        return prompt_ids, completion_ids, completions

    def _generate_single_turn(self, prompt_ids: list[list[int]], images, multimodal_fields) -> list[list[int]]:
        special = self.distortions or self.args.generation_kwargs or self.args.cache_implementation
        sharded = self.is_fsdp_enabled or is_deepspeed_zero3_enabled()  # there, all processes take the same steps
        if self.use_vllm or self.use_transformers_continuous_batching or sharded or special:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields)
        with unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        ) as model:
            sampled, size = [], self.args.sampling_batch_size or len(prompt_ids)
            for first in range(0, len(prompt_ids), size):
                sampled += sample_completions(
                    model,
                    prompt_ids[first : first + size],
                    self._tokenizer.pad_token_id,
                    self.max_completion_length,
                    self.temperature,
                    self.eos_token_ids,
                )
            return sampled

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self._book("forward")
        finished = [bool(ids) and ids[-1] in self.eos_token_ids for ids in completion_ids_list]
        columns = {name: [row[name] for row in inputs] for name in inputs[0] if name not in ("prompt", "completion")}
        columns |= {
            "prompts": prompts,
            "completions": completions,
            "completion_ids": completion_ids_list,
            "finished": finished,
            "trainer_state": self.state,
            "log_extra": self._log_completion_extra,
            "log_metric": self._log_metric,
        }
        values, error = None, None
        try:
            values = call_all(self.reward_funcs, **columns)
        except RewardError as raised:
            error = raised
        # Every process must learn of it, or the others wait for this one until they time out.
        for rank, message in enumerate(gather_object([error and str(error)])):
            if message is not None:
                of_rank = f" (process {rank})" if self.accelerator.num_processes > 1 else ""
                raise RewardError(message + of_rank) from error
        local = torch.tensor(
            [[math.nan if v is None else v for v in row] for row in values],
            dtype=torch.float32,
            device=self.accelerator.device,
        ).T
        if local.isnan().all(1).any():
            self._warn_once(
                "no score", "No reward function applies to some completions; nothing is learned from these."
            )
        self._rollout.rewards_per_func = self.accelerator.gather(local.contiguous())
        self._rollout.finished = self.accelerator.gather(torch.tensor(finished, device=self.accelerator.device))
        self._book("score")
        return self._rollout.rewards_per_func

    def _shape_scores(self, rollout: Rollout) -> Tensor:
        """Weighted sum of the reward functions, then missing_eos, normalization, clipping: (N,)."""
        values = rollout.rewards_per_func
        scores = (values * self.reward_weights.to(values.device).unsqueeze(0)).nansum(dim=1)
        scores[values.isnan().all(dim=1)] = math.nan
        self._mean("eos_rate", rollout.finished.float(), local=False)
        if self.args.missing_eos is not None:
            scores = apply_missing_eos(scores, rollout.finished, **self.args.missing_eos)
        if self.args.normalize_scores:
            moments = self._state.score_moments
            if self.model.training:
                moments.add(scores)
            scores = (scores - moments.mean) / moments.std
        if self.reward_clip_range:
            scores = scores.clamp(*self.reward_clip_range)
        return scores

    def _measure_kl(self, output: dict[str, Tensor], rollout: Rollout) -> None:
        """Fill in the rollout's KL, log it, and say so if it is not what it must be."""
        mask = output["completion_mask"]
        penalty = torch.zeros_like(rollout.policy_pass.logps)
        if self.beta != 0.0:
            log_ratio = (rollout.policy_pass.logps - rollout.ref_pass.logps) * mask
            penalty = ESTIMATORS[self.args.kl_estimator](log_ratio) * mask
            cautious = k3(log_ratio)
            self._mean("kl", log_ratio.sum(1))
            self._mean("kl_per_token", log_ratio, mask)
            self._mean("kl_k3", cautious.sum(1))
            self._mean("kl_k3_per_token", cautious, mask)
            self._mean("beta", torch.tensor([self.beta], device=mask.device))
            self._diagnose_kl(log_ratio, mask, output["prompt_mask"])
        rollout.kl = penalty
        rewards = self._mine(rollout.scores) - self.beta * penalty.sum(1)
        self._mean("reward_mean", rewards.nan_to_num(), (~rewards.isnan()).float())

    def _diagnose_kl(self, log_ratio: Tensor, mask: Tensor, prompt_mask: Tensor) -> None:
        """Warn, with the likely cause, of a KL that is not 0 before the first step, or whose running mean is negative."""
        if not self.model.training:
            return
        state, sums = self._state, log_ratio.sum(1)
        local = [
            torch.ones_like(sums).sum(),
            sums.sum(),
            sums.square().sum(),
            log_ratio.abs().sum(),
            mask.sum().float(),
        ]
        n, total, squares, distance, tokens = self._over_ranks(torch.stack(local)).tolist()
        state.kl_sums = (state.kl_sums + [[n, total, squares]])[-20:]
        seen, mean, square = (sum(column) for column in zip(*state.kl_sums, strict=True))
        mean, square = mean / seen, square / seen
        error = math.sqrt(max(square - mean**2, 0.0) / seen)
        at_start = state.episodes == 0
        exact = self.model.dtype == torch.float32 and self.accelerator.mixed_precision == "no"
        if at_start and distance / max(tokens, 1) > (1e-4 if exact else 0.05):
            what = (
                f"before the first step the KL to the reference is not 0: {distance / max(tokens, 1):.2g} nats a token"
            )
        elif not at_start and mean < -0.01 and mean < -4 * error:
            what = f"the mean KL of the last {len(state.kl_sums)} rollouts is negative: {mean:.2g} nats a completion"
        else:
            return
        found = kl_suspects(self, log_ratio, mask, prompt_mask, at_start)
        looked_at = "sampling settings, temperature, dropout, padding, adapter and weights look right"
        cause = f"Likely cause: {'; '.join(found)}." if found else f"No cause found: {looked_at}."
        self._warn_once("kl at start" if at_start else "negative kl", f"{what}. {cause}")

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._state.warned_of:
            self._state.warned_of.append(what)
            logger.warning(message)

    def _adapt_beta(self, episodes: int) -> None:
        if self.args.kl_target is not None:
            n, total, _ = self._state.kl_sums[-1]
            self.beta = adapted_beta(self.beta, total / n, self.args.kl_target, self.args.kl_horizon, episodes)
            self._state.beta = self.beta

    def _adapt_learning_rate(self) -> None:
        if self.args.lr_kl_target is None or self._state.step_kl is None:
            return
        total, tokens = self._over_ranks(self._state.step_kl).tolist()
        before = self._state.lr_factor
        self._state.lr_factor = adapted_lr_factor(before, total / max(tokens, 1), self.args.lr_kl_target)
        change = self._state.lr_factor / before
        # In the scheduler's own base, which a checkpoint keeps, so that warm-up and decay go on as they are.
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        scheduler.base_lrs = [lr * change for lr in scheduler.base_lrs]
        scheduler._last_lr = [lr * change for lr in scheduler.get_last_lr()]
        for group in self.optimizer.param_groups:
            group["lr"] *= change

    def _add_advantages(self, output: dict[str, Tensor], rollout: Rollout) -> Tensor:
        """Put advantages, and what else the loss needs, into the batch; returns one advantage a completion, (N,)."""
        raise NotImplementedError

    # Forward passes

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **unused
    ) -> tuple[Tensor, None, None]:
        """TRL's way to get a rollout's log-probabilities; entropies and values come along into the rollout."""
        lengths = attention_mask.sum(1)
        P = input_ids.size(1) - logits_to_keep
        parts, order = [], lengths.argsort(descending=True)  # of one length each chunk, so that little is padding
        for rows in order.split(batch_size or len(input_ids)):
            p, t = longest(attention_mask[rows, :P], attention_mask[rows, P:])
            columns = slice(P - p, P + t)
            part = self._forward(model, input_ids[rows, columns], attention_mask[rows, columns], t, entropy=True)
            short = logits_to_keep - t
            parts.append(
                [
                    None if x is None else nn.functional.pad(x, (0, short))
                    for x in (part.logps, part.entropies, part.values)
                ]
            )
        back = order.argsort()
        whole = [None if column[0] is None else torch.cat(column)[back] for column in zip(*parts, strict=True)]
        if self._rollout is not None:
            found = Forward(*whole, aux_loss=None)
            if self._rollout.policy_pass is None:  # TRL asks for the policy's first
                self._rollout.policy_pass = found
            else:
                self._rollout.ref_pass = found
        return whole[0], None, None

    def _forward(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, length: int, entropy: bool = False
    ) -> Forward:
        """One pass over prompts and completions, (B, P + T), for the last `length` = T tokens."""
        more = {"output_router_logits": True} if self.aux_loss_enabled and torch.is_grad_enabled() else {}
        with self.accelerator.autocast():
            logits, outputs = completion_logits(model, input_ids, attention_mask, length, **more)
        logps, entropies = sampled_logps(logits, input_ids[:, -length:], self.temperature, entropy, overwrite=True)
        return Forward(
            logps,
            entropies if entropy else None,
            getattr(outputs, "state_values", None),
            outputs.aux_loss if more else None,
        )

    # What both losses are made of

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # TRL's times it, which in W&B is a row for each micro-batch, under a key that has the class's name in it.
        return self._compute_loss(model, inputs)

    def _forward_batch(self, model: Any, inputs: dict[str, Tensor], entropy: bool = False) -> Forward:
        """One pass over a micro-batch."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        return self._forward(model, ids, attention_mask, inputs["completion_ids"].size(1), entropy)

    def _clipped_losses(self, log_ratio: Tensor, advantages: Tensor, mask: Tensor | None = None) -> Tensor:
        """Policy loss of every action, clipped, and logged; an action is a token or a whole completion.

        Source: Schulman et al. 2017 (1707.06347), equation 7.

        Args:
            log_ratio: log pi - log pi_old, of any shape.
            advantages: Of the same shape.
            mask: Of the same shape, for the logged means; None: all actions count.
        """
        ratio = log_ratio.exp()
        clipped_ratio = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        policy_losses = torch.max(-advantages * ratio, -advantages * clipped_ratio)
        self._mean("policy_loss", policy_losses, mask)
        self._mean("ratio", ratio, mask)
        self._mean("clip_fraction", (-advantages * clipped_ratio > -advantages * ratio).float(), mask)
        return policy_losses

    def _with_aux_loss(self, loss: Tensor, now: Forward) -> Tensor:
        return loss if now.aux_loss is None else loss + self.router_aux_loss_coef * now.aux_loss

    # Batches

    def _get_train_sampler(self, dataset=None):
        dataset = self.train_dataset if dataset is None else dataset
        return EpochSampler(
            self,
            data_source=dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Tensor]:
        if not self.model.training:
            batch = self._generate_and_score_completions(generation_batch)
            every = torch.arange(len(batch["completion_ids"]))
            return micro_batches(batch, [every], len(every), self._over_ranks)[0]
        passes, step = divmod(self._step, self.args.steps_per_generation)
        if step == 0:
            if passes % self.num_iterations == 0:
                self._batch = self._generate_and_score_completions(generation_batch)
                self._order = None
            if self._order is None or self.reshuffles:
                self._order = torch.randperm(len(self._batch["completion_ids"]))
            self._micro_batches = self._micro_batches_of(self._batch, self._order)
        if step % self.args.gradient_accumulation_steps == 0:
            self._state.step_kl = None
        return self._micro_batches[step]

    def _micro_batches_of(self, batch: dict[str, Tensor], order: Tensor) -> list[dict[str, Tensor]]:
        """Micro-batches of one pass over a rollout, whose rows come in this order."""
        size = self._train_batch_size
        return micro_batches(batch, order.split(size * self.args.gradient_accumulation_steps), size, self._over_ranks)

    def training_step(self, *args, **kwargs):
        self._since = self._since or time.perf_counter()
        return super().training_step(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        """As TRL does, with random numbers of its own: training goes on as if there had been no evaluation."""
        self._book("update")
        states = random.getstate(), np.random.get_state()
        with torch.random.fork_rng():
            set_seed(self.args.seed, device_specific=True)
            measured = super().evaluate(*args, **kwargs)
        random.setstate(states[0])
        np.random.set_state(states[1])
        self._since = time.perf_counter() if self._since is not None else None
        return measured

    # Metrics

    def _mean(self, name: str, values: Tensor, mask: Tensor | None = None, local: bool = True) -> None:
        """Log a mean over all processes, micro-batches and steps until the next line: sums are kept, not means.

        Args:
            name: Of the metric.
            values: Of any shape.
            mask: Of the same shape; None: all of them count.
            local: Whether each process has values of its own; False where all have the same.
        """
        mask = torch.ones_like(values) if mask is None else mask
        sums = torch.stack([(values.detach() * mask).sum().float(), mask.sum().float()])
        mode = "train" if self.model.training else "eval"
        self._state.sums[mode][name] = self._state.sums[mode].get(name, 0.0) + (
            sums if local else sums / self.accelerator.num_processes
        )

    def _log_update(self, log_ratio: Tensor, mask: Tensor) -> None:
        """Log how far the policy has moved from the rollout's, in nats a token (k3), from log pi - log pi_old, (B, T)."""
        with torch.no_grad():
            moved = k3(-log_ratio * mask)
        self._mean("approx_kl", moved, mask)
        if self.model.training:
            sums = torch.stack([(moved * mask).sum(), mask.sum().float()])
            self._state.step_kl = sums if self._state.step_kl is None else self._state.step_kl + sums

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        metrics = self._metrics[mode]
        for name in list(metrics):
            values = metrics.pop(name)
            if all(math.isnan(value) for value in values):
                continue  # undefined in every batch, such as the mean of a function that never applied
            if name in METRIC_NAMES:
                metrics[METRIC_NAMES[name]] = values
            elif name.startswith("rewards/"):
                _, function, statistic = name.split("/", 2)
                metrics[f"score/{function}" + ("" if statistic == "mean" else f"/{statistic}")] = values
            elif name.split("/")[0] not in LEFT_OUT:
                metrics[name] = values
        if sums := self._state.sums.pop(mode):
            totals = self._over_ranks(torch.stack([sums[name] for name in sorted(sums)]))
            for name, (total, count) in zip(sorted(sums), totals.tolist(), strict=True):
                if count > 0:
                    metrics[name] = [total / count]
            self._derive(metrics)
        self._state.sums[mode] = {}
        if mode == "train":
            logs["episodes"] = self._state.episodes
            if "train_runtime" not in logs:  # not the summary at the end
                self._log_times(logs)
                self._chart(logs | metrics)
        super().log(logs, start_time)
        if mode == "train" and "train_runtime" not in logs:
            self._since = time.perf_counter()

    def _chart(self, logs: dict[str, float]) -> None:
        """W&B: draw all curves over episodes, and put some of the last rollout's completions into the row to come."""
        if "wandb" not in self.args.report_to:
            return
        import wandb

        if wandb.run is None:  # another process than the main one, or W&B is disabled
            return
        for name in sorted(logs.keys() - self._charted - {"episodes"}):
            # By name: of `train/*` and transformers' own `*`, either may win.
            wandb.define_metric(f"train/{name}", step_metric="train/episodes")
            self._charted.add(name)
        due = self.state.global_step * TABLES // self.state.max_steps
        if due == self._tabled or self.args.log_completions:  # the latter: TRL makes a table itself
            return
        self._tabled = due
        rows = [
            {"step": row["step"], "prompt": as_cell(row["prompt"]), "completion": as_cell(row["completion"])}
            | {"advantage": row["advantage"]}
            | {f"score/{name}": value for name, value in row["scores"].items()}
            for row in self.sampled_completions(TABLE_ROWS)
        ]
        wandb.log({"completions": as_table(rows)}, commit=False)

    def _derive(self, metrics: dict[str, list[float]]) -> None:
        """Add metrics that follow from other means of the same line."""

    def _book(self, phase: str) -> None:
        """Book the time since the last booking on a phase of training."""
        if self._since is None or not self.model.training:
            return
        if self.args.device.type != "cpu":
            torch.accelerator.synchronize()  # or the time would be booked on whoever waits next
        now = time.perf_counter()
        self._seconds[phase] += now - self._since
        self._since = now

    def _log_times(self, logs: dict[str, float]) -> None:
        self._book("update")
        logs |= {f"seconds_{phase}": seconds for phase, seconds in self._seconds.items()}
        episodes, seconds = self._state.episodes - self._state.episodes_logged, sum(self._seconds.values())
        if episodes and seconds:
            logs["episodes_per_second"] = episodes / seconds
        self._state.episodes_logged = self._state.episodes
        self._seconds = dict.fromkeys(PHASES, 0.0)

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

    def _mine(self, of_all: Tensor) -> Tensor:
        """This process's rows of a tensor that holds all processes'."""
        return of_all.chunk(self.accelerator.num_processes)[self.accelerator.process_index]

    def _over_ranks(self, sums: Tensor) -> Tensor:
        return self.accelerator.reduce(sums, reduction="sum")

    # Checkpoints

    def _save_checkpoint(self, model, trial) -> None:
        self._book("update")
        super()._save_checkpoint(model, trial)
        self._since = time.perf_counter()

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        within = self._step % (self.args.steps_per_generation * self.num_iterations) != 0
        state = {
            "ours": self._state.to_dict(),
            "step": self._step,
            "batch": self._batch if within else None,
            "order": self._order if within else None,
            "logs": {
                name: {key: [_plain(x) for x in of_key] for key, of_key in values.items()}
                if isinstance(values, dict)
                else list(values)
                for name, values in self._logs.items()
            },
        }
        torch.save(state, Path(output_dir) / STATE_FILE.format(rank=self.accelerator.process_index))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The trainer calls this when a resumed loop has come to where the checkpoint was made."""
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        file = Path(checkpoint) / STATE_FILE.format(rank=self.accelerator.process_index)
        device = self.accelerator.device
        # Of several processes on a CPU, the device is cpu:0, which torch cannot load to.
        state = torch.load(file, map_location="cpu" if device.type == "cpu" else device, weights_only=True)
        self._state = RunState.from_dict(state["ours"])
        self.beta = self._state.beta
        self._step, self._batch = state["step"], state["batch"]
        if self._batch is not None:
            self._order = state["order"].cpu()
            self._micro_batches = self._micro_batches_of(self._batch, self._order)
        for name, values in state["logs"].items():
            if isinstance(values, dict):
                for key, column in values.items():
                    self._logs[name][key].extend(column)
            else:
                self._logs[name].extend(values)


def _plain(value: Any) -> Any:
    """A number or a text, of what a reward function gave to `log_extra`: a checkpoint is read without running code."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return value if value is None or type(value) in (bool, int, float, str) else str(value)
