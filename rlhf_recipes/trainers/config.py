"""Settings that PPO and RLOO both add to TRL's `RLOOConfig`."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import trl

from rlhf_recipes.recipe.batch import rows_of_rollout, steps_of_rollout

NEUTRAL = {
    "top_p": (None, 1.0),
    "top_k": (None, 0),
    "min_p": (None, 0, 0.0),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0, 0.0),
    "eta_cutoff": (None, 0, 0.0),
    "repetition_penalty": (None, 1.0),
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
"""Generation settings under which tokens come from another distribution than the model's -> values that do nothing."""


def distortions(settings: dict[str, Any]) -> list[str]:
    """`name=value` of every generation setting under which a sampled token's probability is not the model's."""
    return [f"{name}={settings[name]}" for name in NEUTRAL if settings.get(name) not in NEUTRAL[name]]


POSITIVE = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "generation_batch_size",
    "num_generations",
    "num_iterations",
    "max_completion_length",
    "temperature",
    "kl_target",
    "kl_horizon",
    "lr_kl_target",
    "reward_timeout",
    "sampling_batch_size",
)
"""Settings that must be above 0 where they are given: TRL would divide by them, or train on nothing."""


@dataclass
class OnPolicyConfig(trl.RLOOConfig):
    """Settings that PPO and RLOO share, beyond TRL's."""

    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Trades time for GPU memory. None: where there is a GPU, as TRL does."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Dropout makes the first ratio differ from 1."})
    kl_estimator: Literal["k1", "k2", "k3"] = field(
        default="k1", metadata={"help": "Which estimate of the KL is taken from the reward; see kl.py."}
    )
    kl_target: float | None = field(
        default=None,
        metadata={"help": "KL to the reference to keep, in nats a completion, by adapting beta. None: beta is fixed."},
    )
    kl_horizon: int = field(default=10_000, metadata={"help": "Episodes over which beta changes by up to 20 %."})
    lr_kl_target: float | None = field(
        default=None,
        metadata={"help": "KL to the rollout's policy to reach, in nats a token, by adapting the learning rate."},
    )
    missing_eos: dict | None = field(
        default=None,
        metadata={
            "help": "What a completion that was cut off scores: {'mode': 'replace', 'value': v} gives it v, 'subtract' "
            "takes v away from its score. None: what the reward functions say."
        },
    )
    normalize_scores: bool = field(
        default=False, metadata={"help": "Scores minus their running mean, over their running standard deviation."}
    )
    reward_timeout: float | None = field(
        default=None, metadata={"help": "Seconds after which a reward function that does not answer is an error."}
    )
    sampling_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Completions that a process samples at once: fewer need less memory for keys and values. None: those "
            "of the whole rollout. It is not for vLLM and transformers' own generation, which ZeRO-3 and FSDP use."
        },
    )
    allow_truncated_sampling: bool = field(
        default=False,
        metadata={"help": "Allow top_p, top_k, min_p and their like, under which ratios and KL are wrong."},
    )

    def __post_init__(self):
        for name in POSITIVE:
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}.")
        if self.num_generations == 1 and self.needs_siblings:
            raise ValueError(
                "num_generations is 1, but the baseline is made of a prompt's other completions: take at least 2 "
                "generations, or another baseline (in a recipe: rloo.baseline), such as moving_average."
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
            # TRL's last check refuses one completion per prompt, whatever the baseline.
            if self.num_generations != 1 or "at least 2 generations" not in str(error):
                raise
        rows_of_rollout(settings, self.world_size)
        given = {"top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        given |= {"repetition_penalty": self.repetition_penalty} | (self.generation_kwargs or {})
        if given.get("temperature", self.temperature) != self.temperature:
            raise ValueError(
                f"generation_kwargs has temperature {given['temperature']}, training {self.temperature}; set `temperature`."
            )
        if (found := distortions(given)) and not self.allow_truncated_sampling:
            raise ValueError(
                f"{', '.join(found)}: completions would not come from the policy's own distribution, so that ratios and "
                "KL are wrong. Take it out, or set allow_truncated_sampling=True if you mean it."
            )
        if self.missing_eos is not None:
            mode, value = self.missing_eos.get("mode"), self.missing_eos.get("value")
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if set(self.missing_eos) != {"mode", "value"} or mode not in ("replace", "subtract") or not number:
                raise ValueError(
                    f"missing_eos must be {{'mode': 'replace' or 'subtract', 'value': number}}, not {self.missing_eos}."
                )
        if self.kl_target is not None and self.beta == 0.0:
            raise ValueError("kl_target adapts beta, so beta needs a start above 0, such as 0.05.")
        if self.lr_kl_target is not None and self.steps_per_rollout == 1:
            raise ValueError(
                "lr_kl_target needs more than one optimizer step a rollout (num_iterations, steps_per_generation): in "
                "the first one the policy has not moved yet."
            )

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps between one sampling of completions and the next."""
        return steps_of_rollout(vars(self), self.generation_batch_size, self.world_size)

    @property
    def needs_siblings(self) -> bool:
        """Whether the algorithm compares completions of one prompt, so that one completion is too few."""
        return True
