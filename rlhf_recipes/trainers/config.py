"""Settings that all algorithms add to TRL's `RLOOConfig`."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import trl
from transformers import GenerationConfig

from rlhf_recipes.recipe.batch import rows_of_rollout, steps_of_rollout

NEUTRAL = {
    "top_p": (None, 1.0),
    "top_k": (None, 0),
    "min_p": (None, 0, 0.0),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0, 0.0),
    "eta_cutoff": (None, 0, 0.0),
    "repetition_penalty": (None, 1.0),
    "top_h": (None,),
    "encoder_repetition_penalty": (None, 1.0),
    "guidance_scale": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "sequence_bias": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "num_beams": (None, 1),
    "do_sample": (None, True),
}
"""Generation setting that changes the model's distribution -> the values that leave it unchanged."""


def distortions(settings: dict[str, Any]) -> list[str]:
    """`name=value` of every generation setting that changes the model's distribution."""
    return [f"{name}={settings[name]}" for name in NEUTRAL if settings.get(name) not in NEUTRAL[name]]


NOT_GIVEN = dict.fromkeys(
    ("eos_token_id", "pad_token_id", "bos_token_id", "stop_strings"),
    "the tokenizer and the model's generation_config.json say which tokens end a completion",
) | dict.fromkeys(("max_length", "max_new_tokens", "max_time"), "set max_completion_length")
NOT_GIVEN |= dict.fromkeys(("num_return_sequences",), "set num_generations")
"""Generation setting that this project decides -> what to do instead; training would not know of another value."""

POSITIVE = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "generation_batch_size"),
    *("num_generations", "num_iterations", "max_completion_length", "temperature"),
    *("kl_target", "kl_horizon", "lr_kl_target", "reward_timeout", "sampling_batch_size"),
)
"""Settings that must be above 0, or None: otherwise TRL divides by 0, or trains on nothing."""


@dataclass
class OnPolicyConfig(trl.RLOOConfig):
    """Settings that all algorithms share, in addition to TRL's."""

    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Trades time for GPU memory. None: on if there is a GPU, as in TRL."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Dropout makes the first ratio differ from 1."})
    check_first_step: bool = field(
        default=True,
        metadata={
            "help": "Stop if the policy differs from the rollout's, or from the reference it starts from, before the first "
            "step: by more than 1e-3 nats per token in float32, 0.1 in lower precision."
        },
    )
    kl_estimator: Literal["k1", "k2", "k3"] = field(
        default="k1", metadata={"help": "Estimator of the KL in the reward; see kl.py."}
    )
    kl_target: float | None = field(
        default=None,
        metadata={
            "help": "Target of the KL to the reference, in nats per completion; beta adapts to it. None: beta is fixed."
        },
    )
    kl_horizon: int = field(default=10_000, metadata={"help": "Episodes in which beta changes by at most 20 %."})
    lr_kl_target: float | None = field(
        default=None,
        metadata={
            "help": "Target of the KL to the rollout's policy, in nats per token; the learning rate adapts to it."
        },
    )
    missing_eos: dict | None = field(
        default=None,
        metadata={
            "help": "Score of a completion without EOS: {'mode': 'replace', 'value': v} sets it to v, 'subtract' "
            "subtracts v. None: the score of the reward functions."
        },
    )
    normalize_scores: bool = field(
        default=False, metadata={"help": "Scores minus their running mean, over their running standard deviation."}
    )
    reward_timeout: float | None = field(
        default=None, metadata={"help": "Seconds that a call of a reward function may take."}
    )
    sampling_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Completions that a process samples at once; fewer need less memory for keys and values. None: the "
            "whole rollout. vLLM, ZeRO-3 and FSDP ignore it."
        },
    )
    allow_truncated_sampling: bool = field(
        default=False,
        metadata={"help": "Allow top_p, top_k, min_p and similar settings, which make ratios and KL wrong."},
    )

    def __post_init__(self):
        for name, value in [
            *vars(self).items(),
            *(("missing_eos.value", v) for v in (self.missing_eos or {}).values()),
        ]:
            if isinstance(value, float) and not abs(value) <= torch.finfo(torch.float32).max:
                raise ValueError(f"{name} must be a finite number, in float32 too, not {value}.")
        for name in POSITIVE:
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}.")
        if self.num_generations == 1 and self.needs_siblings:
            raise ValueError(
                "num_generations is 1, but the baseline needs other completions of the same prompt: set it to 2 or "
                "more, or choose another baseline (in a recipe: rloo.baseline), such as moving_average."
            )
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.use_cpu and self.bf16 is None:
            self.bf16 = False
        if self.gradient_checkpointing is None and self.activation_checkpointing is None:
            self.gradient_checkpointing = not self.use_cpu
        settings = dict(vars(self))  # before TRL derives the sizes that are not set
        try:
            super().__post_init__()
        except ValueError as error:
            if "generation" in str(error):
                rows_of_rollout(settings, self.world_size)  # its message names the settings to change
            # TRL's last check refuses one completion per prompt with every baseline.
            if self.num_generations != 1 or "at least 2 generations" not in str(error):
                raise
        rows_of_rollout(settings, self.world_size)
        known = GenerationConfig()
        for key in self.generation_kwargs or {}:
            if key in NOT_GIVEN:
                raise ValueError(f"generation_kwargs has {key}, which is not set there; {NOT_GIVEN[key]}.")
            if not hasattr(known, key):
                raise ValueError(f"generation_kwargs has {key}, which is no setting of GenerationConfig.")
        given = {"top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        given |= {"repetition_penalty": self.repetition_penalty} | (self.generation_kwargs or {})
        if given.get("temperature", self.temperature) != self.temperature:
            raise ValueError(
                f"generation_kwargs has temperature {given['temperature']}, training {self.temperature}; set "
                "`temperature`."
            )
        if (found := distortions(given)) and not self.allow_truncated_sampling:
            raise ValueError(
                f"{', '.join(found)}: completions would not come from the policy's own distribution, so ratios and KL "
                "would be wrong. Remove it, or set allow_truncated_sampling=True to accept that."
            )
        if self.missing_eos is not None:
            mode, value = self.missing_eos.get("mode"), self.missing_eos.get("value")
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if set(self.missing_eos) != {"mode", "value"} or mode not in ("replace", "subtract") or not number:
                raise ValueError(
                    f"missing_eos must be {{'mode': 'replace' or 'subtract', 'value': number}}, not {self.missing_eos}."
                )
        if self.kl_target is not None and self.beta == 0.0:
            raise ValueError("kl_target adapts beta, so beta must start above 0, such as 0.05.")
        if self.lr_kl_target is not None and self.steps_per_rollout == 1:
            raise ValueError(
                "lr_kl_target needs more than one optimizer step per rollout (num_iterations, steps_per_generation): "
                "the KL of the first step is always 0."
            )
        if self.lr_kl_target is not None and self.lr_scheduler_type == "reduce_lr_on_plateau":
            raise ValueError(
                "lr_kl_target and lr_scheduler_type reduce_lr_on_plateau both adapt the learning rate; remove one."
            )

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps per rollout."""
        return steps_of_rollout(vars(self), self.generation_batch_size, self.world_size)

    @property
    def needs_siblings(self) -> bool:
        """Whether the algorithm compares completions of one prompt, and so needs at least two."""
        return True
