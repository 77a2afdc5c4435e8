"""The sections of a recipe that belong to its stages: their keys, with meaning and defaults."""

from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from rlhf_recipes.recipe.sections import Data, RewardFunc, Section


class Scratch(Section):
    """A new model with random weights, and a tokenizer trained on the recipe's texts."""

    architecture: str = "gpt2"
    """`model_type` of a transformers configuration."""
    config: dict[str, Any] = {}
    """Keyword arguments of that configuration, except vocabulary and special tokens: the tokenizer decides them."""
    tokenizer: Literal["word", "bpe"] = "word"
    """`word`: words between blanks; `bpe`: byte-level BPE. Trained on the texts of the data."""
    vocabulary: int = Field(default=3000, gt=3)
    """Largest number of tokens, with special tokens."""


class Trained(Section):
    """Settings of every stage that trains."""

    config_class: ClassVar[tuple[str, str]]
    """The class behind `trainer`, as (file, class)."""

    peft: dict[str, Any] | None = None
    """peft's `LoraConfig`: trains an adapter; `{}` has peft's defaults. None: trains all weights."""
    quantization: dict[str, Any] | None = None
    """transformers' `BitsAndBytesConfig`, such as `{load_in_4bit: true}`; needs `peft`. None: no quantization."""
    global_batch_size: int | None = Field(default=None, gt=0)
    """Rows (sft), pairs (reward) or completions (ppo, rloo) of one optimizer step over all processes. The number of GPUs
    then does not change the training: `gradient_accumulation_steps` and the batch of one process, at most
    `trainer.per_device_train_batch_size`, follow. None: the product of these two and the number of processes."""

    @model_validator(mode="after")
    def _adapter_on_quantized_weights(self):
        if self.quantization is not None and self.peft is None:
            raise ValueError("quantization: quantized weights cannot be trained; add peft, such as peft: {r: 8}")
        return self

    @model_validator(mode="after")
    def _one_batch_size(self):
        for key, instead in (
            ("gradient_accumulation_steps", "it follows"),
            ("steps_per_generation", "set generation_batch_size"),
        ):
            if self.global_batch_size is not None and self.trainer.get(key) is not None:
                raise ValueError(f"global_batch_size: take trainer.{key} out ({instead})")
        return self


class Supervised(Trained):
    """Settings of the stages that train on the rows of the data."""

    eval_rows: int | None = Field(default=None, gt=0)
    """Most held-out texts (sft) or pairs (reward), training pairs and gold texts to measure, drawn with the seed. None: 15%
    of the rows that training goes through, at least 64, which takes a fifth of the training's time or less. A higher
    number does not add training pairs."""


class Sft(Supervised):
    """Supervised fine-tuning of a language model on `prompt` + `completion`, or on `text`."""

    config_class = ("trl/trainer/sft_config.py", "SFTConfig")
    model: str | None = None
    """Hub id (`name@revision` pins a branch, tag or commit) or folder of the model to start from. None: `scratch`."""
    scratch: Scratch | None = None
    labels: list[int] | None = None
    """Labels of the texts to train on, such as `[1]` for positive reviews. None: all texts."""
    rouge_prompts: int = Field(default=0, ge=0)
    """Number of held-out prompts whose sampled completions are compared by ROUGE with the gold ones after training."""
    trainer: dict[str, Any] = {}
    """TRL's `SFTConfig`."""

    @model_validator(mode="after")
    def _one_start(self):
        if (self.model is None) == (self.scratch is None):
            raise ValueError(
                "set exactly one of model (start from its weights) and scratch (start from random weights)"
            )
        return self


class Reward(Supervised):
    """A reward model trained on pairs of a chosen and a rejected text."""

    config_class = ("trl/trainer/reward_config.py", "RewardConfig")
    model: str = "stage:sft"
    """The model to start from; it gets a new scalar head unless it is a reward model already."""
    data: Data | None = None
    """Data of its own. None: the recipe's."""
    chosen_label: Literal[0, 1] = 1
    """Label of the chosen texts, if the data has labels instead of pairs; 0 chooses negative ones."""
    pairs: int | None = Field(default=None, gt=0)
    """Number of training pairs to draw from texts with labels; a tenth as many are held out. None: as many as possible."""
    scale_head: bool = False
    """True initializes the new head with N(0, 1 / (d + 1)) for d hidden features (Huang et al. 2024, 2403.17031)."""
    center: Literal["pairs", "gold", "none"] = "pairs"
    """Texts whose mean score the reward function `reward_model` subtracts: both texts of the held-out pairs, or the gold
    completions of the recipe's held-out rows (Huang et al. 2024, detail 15). `none`: nothing. `scoring.json` stores it."""
    trainer: dict[str, Any] = {}
    """TRL's `RewardConfig`."""


class StopWhen(Section):
    """Bounds at which an on-policy training ends early, with its model. None: no bound."""

    kl_above: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Largest KL to the reference, in nats per completion, of one logged line."""
    held_out_falls: int | None = Field(default=None, gt=0)
    """Number of checkpoints in a row, each with a lower held-out score than the one before."""


class OnPolicy(Trained):
    """Settings that all on-policy stages share, such as `ppo` and `rloo`."""

    policy: str = "stage:sft"
    """The model to train, `stage:sft`, a Hub id or a folder; a frozen copy of it is the reference."""
    stop_when: StopWhen = StopWhen()
    """Bounds at which training ends early."""
    keep_best: Literal["held_out_mean", "score_mean"] | None = None
    """The final model is the checkpoint with the highest mean of the held-out score (`eval.held_out_funcs`), or of the score,
    on 64 held-out prompts; eval uses other ones if there are enough. None: the model of the last step."""

    @property
    def is_watched(self) -> bool:
        """Whether every checkpoint is measured on held-out prompts."""
        return self.keep_best is not None or self.stop_when.held_out_falls is not None


class Ppo(OnPolicy):
    """Proximal policy optimization with a learned value baseline and per-token credit."""

    config_class = ("rlhf_recipes/trainers/ppo.py", "PPOConfig")
    value_model: str = "shared"
    """Start of the value network: `shared` is a head on the policy and needs least memory; `policy` is a copy of the
    policy with a head; or a reward model (`stage:reward`, a Hub id, a folder) with the policy's tokenizer."""
    trainer: dict[str, Any] = {}
    """`PPOConfig` of this project: TRL's `RLOOConfig` and PPO's own keys."""


class Rloo(OnPolicy):
    """REINFORCE leave-one-out: the other completions of a prompt are the baseline."""

    config_class = ("rlhf_recipes/trainers/rloo.py", "RLOOConfig")
    baseline: Literal["leave_one_out", "group_mean", "batch_mean", "moving_average", "constant", "none"] = (
        "leave_one_out"
    )
    """The value that is subtracted from a completion's reward; `none` is plain REINFORCE. All except the first two work
    with one completion per prompt (`trainer.num_generations: 1`)."""
    trainer: dict[str, Any] = {}
    """`RLOOConfig` of this project: TRL's, and keys that PPO has, too."""


class Eval(Section):
    """Measurement of the trained models on held-out prompts; every model gets the same prompts."""

    models: dict[str, str] | None = Field(default=None, min_length=1)
    """Name -> model id. None: `base`, the model that stage `sft` starts from, if it has trained weights and training
    starts from `sft`; `sft`, the policy that training starts from; then `ppo` and `rloo` if the recipe has them."""
    reference: str | None = None
    """Name of the model that KL and `perplexity` refer to. None: `sft` if a model has this name,
    otherwise the first model."""
    perplexity_model: str | None = None
    """Model id of another language model, possibly with another tokenizer, for `perplexity_other` of the samples. None:
    `perplexity_other` is not measured."""
    num_prompts: int = Field(default=256, gt=0)
    """Number of held-out prompts; all of them if there are fewer."""
    max_new_tokens: int | None = Field(default=None, gt=0)
    """Longest completion, in tokens. None: as in training."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Sampling temperature, the same for every model."""
    batch_size: int = Field(default=64, gt=0)
    """Completions that are sampled and scored at once."""
    positive_threshold: float = Field(default=0.0, allow_inf_nan=False)
    """A completion is positive when its score is above this."""
    held_out_funcs: list[RewardFunc] = []
    """Reward functions that training does not use; their weighted sum is `held_out_mean`."""
    num_samples: int = Field(default=16, ge=0)
    """Number of completions that the report shows side by side."""


class Judge(Section):
    """The judge that says which of two completions is better (`rlhf-recipes judge`)."""

    models: Annotated[list[str], Field(min_length=2, max_length=2)] | None = None
    """Names of two of eval's models, `[a, b]`; b may be `gold`, the data's gold completions. None: `[ppo, rloo]`, or
    `[ppo, sft]` or `[rloo, sft]` if the recipe has only one of them."""
    backend: Literal["openai", "anthropic", "local", "reward_model"] = "openai"
    """`openai`: any endpoint with OpenAI's chat completions; `local`: a causal language model on this machine, whose
    next token decides; `reward_model`: the higher score wins."""
    model: str | None = None
    """The model's name at the endpoint; a model id for `local` and `reward_model`."""
    base_url: str | None = None
    """Address of an endpoint that is not the vendor's, such as `http://localhost:8000/v1`. None: the value of
    `OPENAI_BASE_URL` or `ANTHROPIC_BASE_URL`, or else the vendor's."""
    criterion: str = (
        "The better completion does what the prompt asks for, is correct, and reads well. Neither its length nor the "
        "order in which the two are shown makes it better."
    )
    """The meaning of `better` for every judge that reads; write your task's own, such as `The better summary ...`."""
    num_prompts: int | None = Field(default=None, gt=0)
    """Number of eval's prompts to judge: the first ones of their random order. None: all."""
    max_new_tokens: int = Field(default=16, gt=0)
    """Longest answer, in tokens: one word and some decoration. A model that thinks first needs thousands."""
    parameters: dict[str, Any] = {"temperature": 0}
    """Parameters of every request, under the endpoint's own names. The default makes answers as repeatable as the endpoint
    allows. Your value replaces all of it, because some models refuse a temperature: `{reasoning_effort: low}`."""
    workers: int = Field(default=8, gt=0)
    """Number of requests at the same time: one answer takes about a second, and most of it is waiting."""
    requests_per_minute: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Most requests per minute, evenly spaced, with retries. None: only the endpoint's own limit counts; every request
    waits as long as the endpoint says."""
    max_retries: int = Field(default=8, ge=0)
    """Tries after the first, with growing pauses of up to 8 s or as long as the endpoint says. They take about a minute,
    and most limits last less."""
    timeout: float = Field(default=60, gt=0, allow_inf_nan=False)
    """Seconds without a sign from the endpoint after which a try fails; a short answer takes a few."""
    price_per_million_tokens: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    """Prices of a million tokens, `[in, out]`, in any currency. None: no cost is shown, because prices change."""
    batch_size: int = Field(default=8, gt=0)
    """Texts of one forward pass of `local` and `reward_model`; judges read long texts."""

    @field_validator("base_url")
    @classmethod
    def _no_secrets(cls, url: str | None) -> str | None:
        if url is not None:
            check_url(url)
        return url


def check_url(url: str) -> None:
    """Refuse an invalid address of an endpoint, and one that may contain a secret: addresses are written to files.

    Raises:
        ValueError: Its message does not repeat the address.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("the address of an endpoint begins with http:// or https:// and a host")
    try:
        _ = parts.port, parts.hostname.encode("idna")
    except ValueError:
        raise ValueError("the address of an endpoint has an invalid host or port") from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            "the address of an endpoint is written to files, so it must not hold a user name, a password or a query; a "
            "key belongs in the environment (OPENAI_API_KEY, ANTHROPIC_API_KEY)"
        )
