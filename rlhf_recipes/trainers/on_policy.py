"""The part that PPO and RLOO share on top of TRL's `RLOOTrainer`: everything but the advantages and the loss."""

import copy
import logging
import math
from pathlib import Path
from typing import Any

import torch
import trl
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.data_utils import is_conversational
from trl.models import prepare_deepspeed, prepare_fsdp, unwrap_model_for_generation
from trl.trainer.utils import disable_dropout_in_model, get_callable_name

from rlhf_recipes.data.tokenizer import continuation
from rlhf_recipes.models.forward import completion_logits, sampled_logps
from rlhf_recipes.models.sampling import sample_completions
from rlhf_recipes.rewards.calls import call_all_on_every_rank
from rlhf_recipes.rewards.checked import checked
from rlhf_recipes.rewards.registry import as_reward_func
from rlhf_recipes.rewards.score import shape_scores
from rlhf_recipes.runs.callbacks import CompletionTables
from rlhf_recipes.runs.checkpoints import Resumable
from rlhf_recipes.trainers.batches import EpochSampler, micro_batches
from rlhf_recipes.trainers.config import OnPolicyConfig, distortions
from rlhf_recipes.trainers.kl import KLControl, k3
from rlhf_recipes.trainers.kl_diagnosis import likely_cause
from rlhf_recipes.trainers.metrics import MetricLog, PhaseTimer, completions_of, rename
from rlhf_recipes.trainers.state import (
    Forward,
    Rollout,
    RunState,
    in_parts,
    own_random_numbers,
    plain_logs,
    restore_logs,
)
from rlhf_recipes.trainers.vllm import send_policy_only

logger = logging.getLogger(__name__)

STATE_FILE = "on_policy_{rank}.pt"
"""In a checkpoint: the state that a rank needs to continue exactly where it stopped."""


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
    """True: each pass over a rollout draws its batches again. TRL's RLOO draws them once."""

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
        self._state = RunState()
        self._kl = KLControl(args)
        self._metric_log = MetricLog()
        self._timer = PhaseTimer(args.device.type)
        self._kept = {"run": self._state, "kl": self._kl, "metrics": self._metric_log, "timer": self._timer}
        self._rollout: Rollout | None = None
        self._batch: dict[str, Tensor] | None = None
        self._order: Tensor | None = None
        self._micro_batches: list[dict[str, Tensor]] = []
        # An instance may hold other weights than its name's on the Hub: its reference is a copy of the instance.
        reference, beta = None, args.beta
        whole = isinstance(model, nn.Module) and peft_config is None and not is_peft_model(model)
        if whole and args.beta != 0.0 and not args.sync_ref_model:
            reference, args.beta = copy.deepcopy(model).requires_grad_(False), 0.0
        super().__init__(
            model, self._as_reward_funcs(reward_funcs, reward_processing_classes, args), args, *more,
            peft_config=peft_config, **kwargs
        )  # fmt: skip
        self.beta = args.beta = beta
        self.callback_handler.callbacks.insert(0, CompletionTables(self))
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
        return [checked(f, get_callable_name(f), may_skip=True, timeout=args.reward_timeout) for f in made]

    def _prepare_reference(self, model: nn.Module) -> nn.Module:
        if self.args.disable_dropout:
            disable_dropout_in_model(model)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(model, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    @property
    def beta(self) -> float:
        """Weight of the KL penalty; the KL control owns it."""
        return self._kl.beta

    @beta.setter
    def beta(self, beta: float) -> None:
        self._kl.beta = beta

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
            self._kl.adapt_learning_rate(self.optimizer, self.lr_scheduler, self._sum_over_ranks)
        self._rollout = Rollout()
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:  # also when a reward function raises: the trainer may go on from a checkpoint
            rollout, self._rollout = self._rollout, None
        output["old_per_token_logps"] = rollout.policy_pass.logps
        self._log_mean("eos_rate", rollout.finished.float(), same_everywhere=True)
        rollout.scores = self._scores(rollout)
        self._measure_kl(output, rollout)
        self._log_mean("entropy", rollout.policy_pass.entropies, output["completion_mask"])
        advantages = self._add_advantages(output, rollout)
        for _ in range(min(len(advantages), len(self._logs["advantages"]))):
            self._logs["advantages"].pop()  # TRL's own
        self._logs["advantages"].extend(advantages.tolist())
        if self.model.training:
            self._state.episodes += len(rollout.scores)
            self._kl.adapt_beta(len(rollout.scores))
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
        values = call_all_on_every_rank(self.reward_funcs, **columns)
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

    def _scores(self, rollout: Rollout) -> Tensor:
        normalize = self._normalize_scores if self.args.normalize_scores else None
        more = (self.args.missing_eos, normalize, self.reward_clip_range)
        return shape_scores(rollout.rewards_per_func, self.reward_weights, rollout.finished, *more)

    def _normalize_scores(self, scores: Tensor) -> Tensor:
        moments = self._state.score_moments
        if self.model.training:
            moments.add(scores)
        return (scores - moments.mean) / moments.std

    def _measure_kl(self, output: dict[str, Tensor], rollout: Rollout) -> None:
        """Fills in the rollout's KL and logs it; warns, with the likely cause, if it cannot be right."""
        mask = output["completion_mask"]
        rollout.kl = torch.zeros_like(rollout.policy_pass.logps)
        if self.beta != 0.0:
            log_ratio = (rollout.policy_pass.logps - rollout.ref_pass.logps) * mask
            rollout.kl = self._kl.penalty(log_ratio, mask)
            cautious = k3(log_ratio)
            self._log_mean("kl", log_ratio.sum(1))
            self._log_mean("kl_per_token", log_ratio, mask)
            self._log_mean("kl_k3", cautious.sum(1))
            self._log_mean("kl_k3_per_token", cautious, mask)
            self._log_mean("beta", torch.tensor([self.beta], device=mask.device))
            if self.model.training:
                at_start = self._state.episodes == 0
                exact = self.model.dtype == torch.float32 and self.accelerator.mixed_precision == "no"
                if wrong := self._kl.watch(log_ratio, mask, at_start, exact, self._sum_over_ranks):
                    cause = likely_cause(self, log_ratio, mask, output["prompt_mask"], at_start)
                    self._warn_once("kl at start" if at_start else "negative kl", f"{wrong}. {cause}")
        rewards = self._local_rows(rollout.scores) - self.beta * rollout.kl.sum(1)
        self._log_mean("reward_mean", rewards.nan_to_num(), (~rewards.isnan()).float())

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._state.warned_of:
            self._state.warned_of.append(what)
            logger.warning(message)

    def _add_advantages(self, output: dict[str, Tensor], rollout: Rollout) -> Tensor:
        """Put advantages, and what else the loss needs, into the batch; returns one advantage a completion, (N,)."""
        raise NotImplementedError

    # Forward passes

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **unused
    ) -> tuple[Tensor, None, None]:
        """TRL's way to get a rollout's log-probabilities; entropies and values come along into the rollout."""
        whole = in_parts(
            lambda ids, mask, t: self._forward(model, ids, mask, t, entropy=True),
            input_ids, attention_mask, logits_to_keep, batch_size or len(input_ids),
        )  # fmt: skip
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
        self._log_mean("policy_loss", policy_losses, mask)
        self._log_mean("ratio", ratio, mask)
        self._log_mean("clip_fraction", (-advantages * clipped_ratio > -advantages * ratio).float(), mask)
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
            return micro_batches(batch, [every], len(every), self._sum_over_ranks)[0]
        self._timer.start()
        passes, step = divmod(self._step, self.args.steps_per_generation)
        if step == 0:
            if passes % self.num_iterations == 0:
                self._batch = self._generate_and_score_completions(generation_batch)
                self._order = None
            if self._order is None or self.reshuffles:
                self._order = torch.randperm(len(self._batch["completion_ids"]))
            self._micro_batches = self._micro_batches_of(self._batch, self._order)
        if step % self.args.gradient_accumulation_steps == 0:
            self._kl.step_kl = None
        return self._micro_batches[step]

    def _micro_batches_of(self, batch: dict[str, Tensor], order: Tensor) -> list[dict[str, Tensor]]:
        """Micro-batches of one pass over a rollout, whose rows come in this order."""
        size = self._train_batch_size
        return micro_batches(
            batch, order.split(size * self.args.gradient_accumulation_steps), size, self._sum_over_ranks
        )

    def evaluate(self, *args, **kwargs):
        """As TRL does, with random numbers of its own: training goes on as if there had been no evaluation."""
        self._book("update")
        with own_random_numbers(self.args.seed):
            measured = super().evaluate(*args, **kwargs)
        self._timer.skip()
        return measured

    # Metrics

    def _log_mean(self, name: str, values: Tensor, mask: Tensor | None = None, same_everywhere: bool = False) -> None:
        """Logs a mean over all processes, micro-batches and steps until the next line.

        Args:
            name: Of the metric.
            values: Of any shape.
            mask: Of the same shape; None: all of them count.
            same_everywhere: True: all processes have these same values. False: each has its own.
        """
        mode = "train" if self.model.training else "eval"
        self._metric_log.add(mode, name, values, mask, self.accelerator.num_processes if same_everywhere else 1)

    def _log_update(self, log_ratio: Tensor, mask: Tensor) -> None:
        """Log how far the policy has moved from the rollout's, in nats a token (k3), from log pi - log pi_old, (B, T)."""
        with torch.no_grad():
            moved = k3(-log_ratio * mask)
        self._log_mean("approx_kl", moved, mask)
        if self.model.training:
            self._kl.add_step_kl(moved, mask)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        metrics = self._metrics[mode]
        rename(metrics)
        metrics.update(self._metric_log.take_means(mode, self._sum_over_ranks))
        self._derive(metrics)
        is_line = mode == "train" and "train_runtime" not in logs  # not the summary at the end
        if mode == "train":
            logs["episodes"] = self._state.episodes
        if is_line:
            self._book("update")
            logs |= self._timer.take(self._state.episodes)
        super().log(logs, start_time)
        if is_line:
            self._timer.skip()

    def _derive(self, metrics: dict[str, list[float]]) -> None:
        """Adds metrics that follow from other means of the same line."""

    def _book(self, phase: str) -> None:
        """Counts the time since the last booking for a phase of training."""
        if self.model.training:
            self._timer.book(phase)

    def sampled_completions(self, number: int) -> list[dict[str, Any]]:
        """The first `number` completions of the last rollout, with their scores and advantages."""
        return completions_of(self._logs, number, self.state.global_step)

    def _local_rows(self, of_all: Tensor) -> Tensor:
        """This process's rows of a tensor that holds all processes'."""
        return of_all.chunk(self.accelerator.num_processes)[self.accelerator.process_index]

    def _sum_over_ranks(self, sums: Tensor) -> Tensor:
        return self.accelerator.reduce(sums, reduction="sum")

    # Checkpoints

    def _save_checkpoint(self, model, trial) -> None:
        self._book("update")
        super()._save_checkpoint(model, trial)
        self._timer.skip()

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        within = self._step % (self.args.steps_per_generation * self.num_iterations) != 0
        state = {name: part.to_dict() for name, part in self._kept.items()}
        state |= {"step": self._step, "logs": plain_logs(self._logs)}
        state |= {"batch": self._batch if within else None, "order": self._order if within else None}
        torch.save(state, Path(output_dir) / STATE_FILE.format(rank=self.accelerator.process_index))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The trainer calls this when a resumed loop reaches the step of the checkpoint."""
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        file = Path(checkpoint) / STATE_FILE.format(rank=self.accelerator.process_index)
        device = self.accelerator.device
        # Of several processes on a CPU, the device is cpu:0, which torch cannot load to.
        state = torch.load(file, map_location="cpu" if device.type == "cpu" else device, weights_only=True)
        for name, part in self._kept.items():
            part.load(state[name])
        restore_logs(self._logs, state["logs"])
        self._step, self._batch = state["step"], state["batch"]
        if self._batch is not None:
            self._order = state["order"].cpu()
            self._micro_batches = self._micro_batches_of(self._batch, self._order)
