"""The part that PPO and RLOO share on top of TRL's `RLOOTrainer`: everything but the advantages and the loss."""

import math
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import trl
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.data_utils import is_conversational
from trl.models import unwrap_model_for_generation
from trl.trainer.callbacks import SyncRefModelCallback

from rlhf_recipes.data.tokenizer import continuation
from rlhf_recipes.models.dropout import switch_off
from rlhf_recipes.models.forward import completion_logits, sampled_logps
from rlhf_recipes.models.sampling import sample_completions
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.rewards.apart import RewardStreams
from rlhf_recipes.rewards.calls import CheckedReward, call_all_on_every_rank
from rlhf_recipes.rewards.from_trl import as_reward_funcs
from rlhf_recipes.rewards.score import shape_scores, weighted_sum
from rlhf_recipes.runs.callbacks import CompletionTables
from rlhf_recipes.runs.checkpoints import Resumable
from rlhf_recipes.runs.divergence import require_finite
from rlhf_recipes.runs.order import EpochSampler
from rlhf_recipes.trainers.batches import MicroBatches
from rlhf_recipes.trainers.config import OnPolicyConfig, distortions
from rlhf_recipes.trainers.first_step import check_first_step, starts_from_reference
from rlhf_recipes.trainers.kl import KLControl, k3, kl_metrics
from rlhf_recipes.trainers.kl_diagnosis import likely_cause
from rlhf_recipes.trainers.metrics import MetricLog, PhaseTimer, RolloutLogs, rename
from rlhf_recipes.trainers.reference import SyncReference, frozen_copy, prepare
from rlhf_recipes.trainers.state import Forward, Rollout, RunState, in_parts, own_random_numbers, read_state
from rlhf_recipes.trainers.vllm import send_policy_only

OF_SCORES = "a weight of reward_funcs, missing_eos.value, or values of a reward function that are too large"

STATE_FILE = "on_policy_{rank}.pt"
"""In a checkpoint: the state that a rank needs to continue exactly where it stopped."""


class OnPolicyTrainer(Resumable, trl.RLOOTrainer):
    """TRL's `RLOOTrainer`, changed so that two algorithms can be compared exactly.

    1. `__init__`: Reward functions get copies of their lists, and an error names the function.
    2. Reference: A model instance is compared with a copy of itself, not with the weights that its name has on the Hub.
    3. Generation: Prompts are sampled without padding of other batches. A completion is decoded together with its
       prompt, so that `prompt + completion` is the sampled text. Reward functions learn which completions are
       `finished` (ended with EOS). An error in one process stops all processes.
    4. Log-probabilities: They are computed at the positions of sampling. TRL's positions are wrong where a model has
       learned positions (GPT-2) and the prompt is padded.
    5. Losses: An optimizer step is one batch, however many micro-batches and processes share it.
    6. Evaluation: It has its own random numbers, so that it does not change training.
    7. Metrics have one set of names; see the README. A checkpoint holds the whole state, also within a rollout.

    A subclass adds `_add_advantages` and `_compute_loss`.
    """

    config_class: type[OnPolicyConfig]
    reshuffles = False
    """True: every pass over a rollout draws its batches again. False: once per rollout, as TRL does."""

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
        self._run_state, self._kl, self._metric_log = RunState(), KLControl(args), MetricLog()
        self._timer, self._micro_batches = PhaseTimer(args.device.type), MicroBatches(args, self._sum_over_ranks)
        self._rollout: Rollout | None = None
        self.held_out: tuple[list[CheckedReward], Tensor] | None = None
        """Reward functions, and their weights, of which evaluations log the weighted sum as `held_out_mean`."""
        self._evaluated: dict[str, float] = {}
        reward_funcs, tokenizers = as_reward_funcs(reward_funcs, reward_processing_classes, args.reward_timeout)
        reference, beta, syncs = frozen_copy(model, args, peft_config), args.beta, args.sync_ref_model
        if reference is not None:
            args.beta, args.sync_ref_model = 0.0, False  # with 0, TRL loads no reference
        super().__init__(model, reward_funcs, args, *more, peft_config=peft_config, **kwargs)
        self.reward_processing_classes = tokenizers
        self.beta, args.beta, args.sync_ref_model = beta, beta, syncs
        if reference is not None:
            self.ref_model = prepare(reference, self.accelerator)
        if syncs:
            self.remove_callback(SyncRefModelCallback)
            self.add_callback(SyncReference(self))
        self.rates_of_dropout = switch_off(self.model) if args.disable_dropout else []
        """What `disable_dropout` has set to 0; the final model's configuration gets it back."""
        if self.ref_model is not None and args.disable_dropout:
            switch_off(self.ref_model)
        self._rollout_logs = RolloutLogs(self._logs)
        self._reward_streams = RewardStreams(args.seed, self.accelerator.process_index)
        kept: tuple[Any, ...] = (self._run_state, self._kl, self._metric_log, self._timer)
        kept += (self._micro_batches, self._rollout_logs, self._reward_streams)
        self._kept_in_checkpoints = {type(part).__name__: part for part in kept}
        self.callback_handler.callbacks.insert(0, CompletionTables(self))
        if self.use_vllm:
            send_policy_only(self)
        if self._is_vlm:
            raise RecipeError(
                f"{type(self).__name__} trains on text only; {type(self.processing_class).__name__} is a multimodal processor."
            )
        if self.distortions and not args.allow_truncated_sampling:
            raise RecipeError(
                f"The model's generation_config has {', '.join(self.distortions)}: completions would not come from the "
                "policy's own distribution, so ratios and KL would be wrong. Remove it from generation_config.json, or "
                "set allow_truncated_sampling=True to accept that."
            )

    # Generation and scores

    @property
    def distortions(self) -> list[str]:
        """Active generation settings that change the distribution of the tokens."""
        if self.use_vllm:  # it takes only these from the trainer
            return distortions({name: getattr(self.args, name) for name in ("top_p", "top_k", "min_p")})
        ours = {name: value for name, value in self.generation_config.to_dict().items() if value is not None}
        return distortions(self.accelerator.unwrap_model(self.model).generation_config.to_dict() | ours)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        self._timer.book("update")
        if self.model.training:
            self._kl.adapt_learning_rate(self.optimizer, self.lr_scheduler, self._sum_over_ranks)
        self._rollout = Rollout()
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:  # also after an error of a reward function: the trainer may resume from a checkpoint
            rollout, self._rollout = self._rollout, None
        output["old_per_token_logps"] = rollout.policy_pass.logps
        self._log_mean("eos_rate", rollout.finished.float(), same_everywhere=True)
        rollout.scores = self._scores(rollout)
        # NaN: no reward function applies.
        require_finite(self, "score", rollout.scores.nan_to_num(0.0, math.inf, -math.inf).sum().item(), OF_SCORES)
        self._measure_kl(output, rollout)
        self._log_mean("entropy", rollout.policy_pass.entropies, output["completion_mask"])
        self._rollout_logs.replace_advantages(self._add_advantages(output, rollout).tolist())
        if self.model.training:
            self._run_state.episodes += len(rollout.scores)
            self.beta = self._kl.next_beta(self.beta, len(rollout.scores))
        self._timer.book("forward")
        return output

    def _generate(self, prompts: list):
        prompt_ids, completion_ids, completions = super()._generate(prompts)
        if not is_conversational({"prompt": prompts[0]}):
            completions = [continuation(self._tokenizer, p, c) for p, c in zip(prompt_ids, completion_ids, strict=True)]
        self._timer.book("generate")
        return prompt_ids, completion_ids, completions

    def _generate_single_turn(self, prompt_ids: list[list[int]], images, multimodal_fields) -> list[list[int]]:
        special = self.distortions or self.args.generation_kwargs or self.args.cache_implementation
        sharded = self.is_fsdp_enabled or is_deepspeed_zero3_enabled()  # all processes must take the same steps
        if self.use_vllm or self.use_transformers_continuous_batching or sharded or special:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields)
        size, sampled = self.args.sampling_batch_size or len(prompt_ids), []
        settings = self._tokenizer.pad_token_id, self.max_completion_length, self.temperature, self.eos_token_ids
        more = {"gradient_checkpointing_kwargs": self.args.gradient_checkpointing_kwargs}
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator, **more) as model:
            for first in range(0, len(prompt_ids), size):
                sampled += sample_completions(model, prompt_ids[first : first + size], *settings)
        return sampled

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self._timer.book("forward")
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
        table = self._rewards_of(self.reward_funcs, columns)
        if self.held_out is not None and not self.model.training:
            functions, weights = self.held_out
            scores = weighted_sum(self._rewards_of(functions, columns), weights)
            self._log_mean("held_out_mean", scores.nan_to_num(), (~scores.isnan()).float())
        if table.isnan().all(1).any():
            message = "No reward function applies to some completions; the policy does not learn from them."
            self._run_state.warn_once("no score", message)
        self._rollout.rewards_per_func = self.accelerator.gather(table.contiguous())
        self._rollout.finished = self.accelerator.gather(torch.tensor(finished, device=table.device))
        self._timer.book("score")
        return self._rollout.rewards_per_func

    def _rewards_of(self, functions: list[CheckedReward], columns: dict[str, Any]) -> Tensor:
        """The values of reward functions on this process's completions, (B, functions); NaN where one does not apply."""
        values = call_all_on_every_rank(functions, self._reward_streams, **columns)
        return torch.tensor(np.array(values, dtype=np.float32).T, device=self.accelerator.device)  # None becomes NaN

    def _scores(self, rollout: Rollout) -> Tensor:
        moments = self._run_state.score_moments
        normalize = partial(moments.normalized, add=self.model.training) if self.args.normalize_scores else None
        more = self.args.missing_eos, normalize, self.reward_clip_range
        return shape_scores(rollout.rewards_per_func, self.reward_weights, rollout.finished, *more)

    def _measure_kl(self, output: dict[str, Tensor], rollout: Rollout) -> None:
        """Computes the rollout's KL and logs it; warns, with the likely cause, if the KL must be wrong."""
        mask = output["completion_mask"]
        rollout.kl = torch.zeros_like(rollout.policy_pass.logps)
        if self.beta != 0.0:
            log_ratio = (rollout.policy_pass.logps - rollout.ref_pass.logps) * mask
            rollout.kl = self._kl.penalty(log_ratio, mask)
            for name, values in kl_metrics(log_ratio).items():
                self._log_mean(name, values, mask if values.ndim == 2 else None)
            self._log_mean("beta", torch.tensor([self.beta], device=mask.device))
            if self.model.training:
                about = log_ratio, mask, output["prompt_mask"]
                if self._run_state.episodes == 0:
                    check_first_step(self, "the reference", *about, must_be_equal=starts_from_reference(self))
                wrong = self._kl.watch(log_ratio, self._sum_over_ranks)
                require_finite(self, "KL to the reference", self._kl.kl_sums[-1][1])
                if wrong:
                    cause = likely_cause(self, *about, at_start=False)
                    self._run_state.warn_once("negative kl", f"{wrong}. {cause}")
        rewards = self._local_rows(rollout.scores) - self.beta * rollout.kl.sum(1)
        self._log_mean("reward_mean", rewards.nan_to_num(), (~rewards.isnan()).float())

    def _add_advantages(self, output: dict[str, Tensor], rollout: Rollout) -> Tensor:
        """Puts the advantages, and whatever else the loss needs, into the batch; one advantage per completion, (N,)."""
        raise NotImplementedError

    # Log-probabilities

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **unused
    ) -> tuple[Tensor, None, None]:
        """TRL calls this for a rollout's log-probabilities; it also keeps entropies and values in the rollout."""
        forward = partial(self._forward, model, entropy=True)
        whole = in_parts(forward, input_ids, attention_mask, logits_to_keep, batch_size or len(input_ids))
        if self._rollout is not None:
            self._rollout.add(whole)
        return whole.logps, None, None

    def _forward(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, length: int, entropy: bool = False
    ) -> Forward:
        """One pass over prompts and completions, (B, P + T), for the last `length` = T tokens."""
        more = {"output_router_logits": True} if self.aux_loss_enabled and torch.is_grad_enabled() else {}
        with self.accelerator.autocast():
            logits, outputs = completion_logits(model, input_ids, attention_mask, length, **more)
        logps, entropies = sampled_logps(logits, input_ids[:, -length:], self.temperature, entropy, overwrite=True)
        values, aux_loss = getattr(outputs, "state_values", None), outputs.aux_loss if more else None
        return Forward(logps, entropies if entropy else None, None if values is None else values.real, aux_loss)

    def _forward_batch(self, model: Any, inputs: dict[str, Tensor], entropy: bool = False) -> Forward:
        """One pass over a micro-batch."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        prompt_mask, mask = inputs["prompt_mask"], inputs["completion_mask"]
        now = self._forward(model, ids, torch.cat([prompt_mask, mask], dim=1), mask.size(1), entropy)
        if self.model.training and self.state.global_step == 0:
            log_ratio = now.logps.detach() - inputs["old_per_token_logps"]
            check_first_step(self, "the policy that sampled the rollout", log_ratio, mask, prompt_mask)
        return now

    # Losses

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # TRL times each call. In W&B that adds a row per micro-batch, under a key with the class's name.
        return self._compute_loss(model, inputs)

    def _clipped_losses(self, log_ratio: Tensor, advantages: Tensor, mask: Tensor | None = None) -> Tensor:
        """The clipped policy loss of every action, logged too; an action is a token or a whole completion.

        Source: Schulman et al. 2017 (1707.06347), equation 7.

        Args:
            log_ratio: log pi - log pi_old, of any shape.
            advantages: Of the same shape.
            mask: Of the same shape, for the logged means; None: all actions count.
        """
        ratio = log_ratio.exp()
        clipped_ratio = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        policy_losses = torch.max(-advantages * ratio, -advantages * clipped_ratio)
        self._log_mean("policy_loss", policy_losses, mask)
        self._log_mean("ratio", ratio, mask)
        self._log_mean("clip_fraction", (-advantages * clipped_ratio > -advantages * ratio).float(), mask)
        return policy_losses

    def _with_aux_loss(self, loss: Tensor, now: Forward) -> Tensor:
        return loss if now.aux_loss is None else loss + self.router_aux_loss_coef * now.aux_loss

    def _log_update(self, log_ratio: Tensor, mask: Tensor, moves: bool = True) -> None:
        """Logs how far the policy is from the rollout's, in nats per token (k3).

        Args:
            log_ratio: log pi - log pi_old, (B, T).
            mask: Completion tokens, (B, T).
            moves: False while the policy does not train: the learning rate is then not adapted to its KL.
        """
        with torch.no_grad():
            moved = k3(-log_ratio * mask)
        self._log_mean("approx_kl", moved, mask)
        if self.model.training and moves:
            self._kl.add_step_kl(moved, mask)

    # Batches

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        return EpochSampler(sampler, sampler.seed, self)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Tensor]:
        if not self.model.training:
            return self._micro_batches.single(self._generate_and_score_completions(generation_batch))
        self._timer.start()
        passes, step = divmod(self._step, self.args.steps_per_generation)
        if step == 0 and passes % self.num_iterations == 0:
            self._micro_batches.take(self._generate_and_score_completions(generation_batch))
        elif step == 0 and self.reshuffles:
            self._micro_batches.shuffle()
        if step % self.args.gradient_accumulation_steps == 0:
            self._kl.step_kl = None
        return self._micro_batches.parts[step]

    # Evaluation

    def evaluate(self, *args, **kwargs):
        """As TRL's, with its own random numbers: training continues as if there had been no evaluation.

        It returns all metrics of the log line, so that each of them can choose the best model.
        """
        of_training = self._reward_streams
        self._reward_streams = RewardStreams(self.args.seed, self.accelerator.process_index)
        try:
            with self._timer.paused(), self._rollout_logs.set_aside(), own_random_numbers(self.args.seed):
                return super().evaluate(*args, **kwargs) | self._evaluated
        finally:
            self._reward_streams = of_training

    # Metrics

    def _log_mean(self, name: str, values: Tensor, mask: Tensor | None = None, same_everywhere: bool = False) -> None:
        """Adds values to a metric; the next log line has their mean over all processes, micro-batches and steps.

        Args:
            name: The metric.
            values: Of any shape.
            mask: Of the same shape; None: all values count.
            same_everywhere: True: all processes have these same values. False: each has its own.
        """
        mode = "train" if self.model.training else "eval"
        self._metric_log.add(mode, name, values, mask, self.accelerator.num_processes if same_everywhere else 1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        metrics = self._metrics[mode]
        rename(metrics)
        metrics.update(self._metric_log.take_means(mode, self._sum_over_ranks))
        if mode == "eval":
            self._evaluated = {f"eval_{name}": fmean(values) for name, values in metrics.items()}
        with self._timer.paused():
            if mode == "train":
                logs["episodes"] = self._run_state.episodes
                if "train_runtime" not in logs:  # not the summary at the end
                    logs |= self._timer.take(self._run_state.episodes)
            super().log(logs, start_time)

    def sampled_completions(self, number: int) -> list[dict[str, Any]]:
        """The first `number` completions of the last rollout, with their scores and advantages."""
        return self._rollout_logs.first(number, self.state.global_step)

    def _local_rows(self, of_all: Tensor) -> Tensor:
        """This process's rows of a tensor that holds the rows of all processes."""
        return of_all.chunk(self.accelerator.num_processes)[self.accelerator.process_index]

    def _sum_over_ranks(self, sums: Tensor) -> Tensor:
        return self.accelerator.reduce(sums, reduction="sum")

    # Checkpoints

    def _save_checkpoint(self, model, trial) -> None:
        with self._timer.paused():
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._step % (self.args.steps_per_generation * self.num_iterations) == 0:
            self._micro_batches.clear()  # the next step samples a new rollout
        state = {name: part.to_dict() for name, part in self._kept_in_checkpoints.items()}
        state |= {"step": self._step, "beta": self.beta}
        if self.args.sync_ref_model:  # else the reference is the start of the run
            state["reference"] = self.accelerator.unwrap_model(self.ref_model).state_dict()
        torch.save(state, Path(output_dir) / STATE_FILE.format(rank=self.accelerator.process_index))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The trainer calls this when a resumed loop reaches the step of the checkpoint."""
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            file = Path(checkpoint) / STATE_FILE.format(rank=self.accelerator.process_index)
            state = read_state(file, self.accelerator.device)
            for name, part in self._kept_in_checkpoints.items():
                part.load(state[name])
            self._step, self.beta = state["step"], state["beta"]
            if "reference" in state:
                self.accelerator.unwrap_model(self.ref_model).load_state_dict(state["reference"])
