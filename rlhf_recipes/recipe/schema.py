"""The schema of a recipe: what may stand in its YAML file, what each key means, and why its default is what it is.

Every section is closed: an unknown key is an error. What stands under `trainer:`, `peft:` and `quantization:` belongs to
TRL, peft and transformers, and is checked against their own classes by `recipe.py`.
"""

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class RecipeError(ValueError):
    """An error in a recipe or its inputs. The message says where, what was found and what to do."""


STAGES = ("sft", "reward", "ppo", "rloo", "eval", "compare")
"""Stages in the order in which `run` goes through them."""

RENAMED_METRICS = {"judge_mean": "held_out_mean", "judge_positive_share": "held_out_positive_share"}
"""Old name of a metric -> its name."""

Range = Annotated[list[int], Field(min_length=2, max_length=2)]


class Section(BaseModel):
    """A part of a recipe: closed, and strict about types, so that `seed: "42"` is an error and not a guess."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Data(Section):
    """Where rows come from and what is made of them.

    Rows need one of these sets of columns: `prompt` (text or chat messages; with `completion` for `sft`), `text` (prompts
    are its first tokens or words; with `label` 0/1 for `reward`), for `sft` alone `messages`, or, for `reward`, `chosen`
    and `rejected`, or `completion_0`, `completion_1` and `choice` (0 or 1: which of them was chosen).
    """

    path: str
    """Hub id, local file (jsonl, json, csv, parquet), local folder, or `package:NAME/FILE` of an installed package."""
    config: str | None = None
    """Configuration of a Hub data set (`datasets` calls it `name`)."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    train_split: str = "train"
    eval_split: str | None = None
    """Split of held-out rows. None: `eval_fraction` of the training rows is held out, by row; always the same rows."""
    eval_fraction: float = Field(default=0.05, gt=0, lt=1)
    columns: dict[str, str] = {}
    """Our column name -> its name in the data, such as `{text: review, label: sentiment}`; inside of a column, a path
    such as `info.title` or `summaries.0.text`."""
    filter: dict[str, str | int | float | bool] = {}
    """Keep rows whose column (its name in the data) equals the value."""
    max_rows: int | None = Field(default=None, gt=0)
    """Use this many rows of each split, drawn with the recipe's seed. None: all."""
    transform: str | None = None
    """`module:function` or `path/to/file.py:function` of your own that makes rows of a batch of the data's: it takes and
    returns a dictionary of column name -> list. The file may stand beside the recipe, as `recipes/film_reviews.py` does.
    `columns` are looked for in the rows that it makes."""
    prompt_template: str | None = None
    """Makes `prompt` from other columns, such as `"TITLE: {title}\\n\\nPOST: {post}\\n\\nTL;DR:"`."""
    completion_prefix: str = ""
    """Stands in front of every `completion`, `chosen` and `rejected`: a blank, where prompts end without one."""
    max_prompt_tokens: int | None = Field(default=None, gt=0)
    """Longest prompt of a row's own, in tokens of the model. Longer ones are cut by `truncate`, or left out."""
    truncate: str | None = None
    """Column in `prompt_template` that loses its last paragraphs, as many as it takes to fit `max_prompt_tokens`; where
    one paragraph is left, its last characters."""
    prompt_tokens: Range = [2, 8]
    """Shortest and longest prompt cut from `text`, in tokens of the policy; each length is equally likely."""
    prompt_words: Range | None = None
    """The same in words; it takes the place of `prompt_tokens`."""
    invalid_rows: Literal["refuse", "drop"] = "refuse"
    """Action on rows with an empty prompt or completion, or with a pair of equal texts; `drop` reports how many."""

    @model_validator(mode="after")
    def _ranges_ascend(self):
        for name, bounds in (
            ("prompt_tokens", self.prompt_tokens),
            ("prompt_words", self.prompt_words),
        ):
            if bounds and not 1 <= bounds[0] <= bounds[1]:
                raise ValueError(f"{name} must be two numbers with 1 <= shortest <= longest, not {bounds}")
        return self


class RewardFunc(Section):
    """One term of the score: `weight` times what the reward function says."""

    name: str
    """A name that `rlhf-recipes rewards` lists, or `module:function`, or `path/to/file.py:function`."""
    weight: float = Field(default=1.0, allow_inf_nan=False)
    args: dict[str, Any] = {}
    """Keyword arguments of the reward function's factory."""
    timeout: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Seconds that one call may take, for functions that ask something remote: a call that hangs then stops the run. It
    is made in a thread of its own, where signals (`signal.alarm`) do not work. None: as long as it takes."""


class MissingEos(Section):
    """Score of a completion that was cut off before EOS."""

    mode: Literal["replace", "subtract"]
    """`replace`: it scores `value`, whatever the reward functions say (Huang et al. 2024, 2403.17031: -1). `subtract`:
    `value` less than they say (TRL's former `missing_eos_penalty`)."""
    value: float


class Scratch(Section):
    """A new model with random weights, and a tokenizer trained on the recipe's texts."""

    architecture: str = "gpt2"
    """`model_type` of a transformers configuration."""
    config: dict[str, Any] = {}
    """Keyword arguments of that configuration; vocabulary and special tokens follow from the tokenizer."""
    tokenizer: Literal["word", "bpe"] = "word"
    vocabulary: int = Field(default=3000, gt=3)
    """Number of tokens at most, special tokens included."""


class Trained(Section):
    """Settings of every stage that trains, beside `trainer`."""

    peft: dict[str, Any] | None = None
    """peft's `LoraConfig`: trains an adapter, `{}` one with peft's defaults. None: trains all weights."""
    quantization: dict[str, Any] | None = None
    """transformers' `BitsAndBytesConfig`, such as `{load_in_4bit: true}`; it needs `peft`. None: weights as they are."""
    global_batch_size: int | None = Field(default=None, gt=0)
    """Rows (sft), pairs (reward) or completions (ppo, rloo) of one optimizer step over all processes, so that one GPU
    trains as eight do: what one process takes at once, at most `trainer.per_device_train_batch_size`, and
    `gradient_accumulation_steps` follow. None: the product of these two and the number of processes, as transformers does."""

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


class Sft(Trained):
    """Supervised fine-tuning of a language model on `prompt` + `completion`, or on `text`."""

    model: str | None = None
    """Hub id (`name@revision` pins a branch, tag or commit) or folder to start from. None: `scratch` makes one."""
    scratch: Scratch | None = None
    labels: list[int] | None = None
    """Train only on texts with one of these labels, such as `[1]` for positive reviews. None: on all."""
    rouge_prompts: int = Field(default=0, ge=0)
    """Held-out prompts, of rows that have a completion, whose sampled completions are measured by ROUGE at the end."""
    trainer: dict[str, Any] = {}
    """TRL's `SFTConfig`."""

    @model_validator(mode="after")
    def _one_start(self):
        if (self.model is None) == (self.scratch is None):
            raise ValueError(
                "set exactly one of model (start from its weights) and scratch (start from random weights)"
            )
        return self


class Reward(Trained):
    """A reward model trained on pairs of a chosen and a rejected text."""

    model: str = "stage:sft"
    """Where the backbone starts from; the scalar head is new, unless this is a reward model already."""
    data: Data | None = None
    """Pairs of a data set of their own. None: the recipe's."""
    chosen_label: Literal[0, 1] = 1
    """Texts with this label are the chosen ones, where the data has labels instead of pairs; 0: negative ones."""
    pairs: int | None = Field(default=None, gt=0)
    """Training pairs to draw from texts with labels; held-out pairs: a tenth of it. None: as many as the texts give."""
    scale_head: bool = False
    """Whether the new head starts as N(0, 1 / (d + 1)) for d hidden features (Huang et al. 2024, 2403.17031)."""
    center: Literal["pairs", "reference", "none"] = "pairs"
    """Whose mean score is stored in `scoring.json`, for the reward function `reward_model` to take away: both texts of
    held-out pairs, or the completions of the recipe's own held-out rows (Huang et al. 2024, detail 15). `none`: 0."""
    trainer: dict[str, Any] = {}
    """TRL's `RewardConfig`."""


class OnPolicy(Trained):
    """Settings that the stages `ppo` and `rloo` share."""

    policy: str = "stage:sft"
    """The model to train, also its frozen reference: `stage:sft`, a Hub id or a folder."""


class Ppo(OnPolicy):
    """Proximal policy optimization with a learned value baseline and per-token credit."""

    value_model: str = "shared"
    """Where the value network starts from: `shared` is a head on the policy, `policy` a copy of the policy with a head;
    or a reward model (`stage:reward`, a Hub id, a folder) with the policy's tokenizer. Shared costs least."""
    trainer: dict[str, Any] = {}
    """Our `PPOConfig`: TRL's `RLOOConfig` and PPO's own keys."""


class Rloo(OnPolicy):
    """REINFORCE leave-one-out: the other completions of a prompt are the baseline."""

    baseline: Literal["leave_one_out", "group_mean", "batch_mean", "moving_average", "constant", "none"] = (
        "leave_one_out"
    )
    """What is taken away from a completion's reward; `none` is plain REINFORCE. All but the first two work with one
    completion a prompt (`trainer.num_generations: 1`)."""
    trainer: dict[str, Any] = {}
    """Our `RLOOConfig`: TRL's, and keys that PPO has too."""


class Eval(Section):
    """Measurement of the trained models on held-out prompts, the same for every model."""

    models: dict[str, str] | None = Field(default=None, min_length=1)
    """Name -> model reference. None: `base`, what stage `sft` starts from, where that is trained on and is not new; as
    `sft` the policy that training starts from; then `ppo` and `rloo` where the recipe has them."""
    reference: str | None = None
    """Name of the model that KL and `perplexity` refer to. None: `sft` where it is among them, or else the first."""
    perplexity_model: str | None = None
    """Reference of another language model, which may have another tokenizer: `perplexity_other` of the samples. None:
    that is not measured."""
    num_prompts: int = Field(default=256, gt=0)
    max_new_tokens: int | None = Field(default=None, gt=0)
    """Longest completion. None: as in training."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    batch_size: int = Field(default=64, gt=0)
    positive_threshold: float = Field(default=0.0, allow_inf_nan=False)
    """A completion is positive when its score is above this."""
    held_out_funcs: list[RewardFunc] = []
    """Reward functions that training did not see: their weighted sum is `held_out_mean`."""
    num_samples: int = Field(default=16, ge=0)
    """Completions shown side by side."""


class Judge(Section):
    """Who says which of two completions is better, and how it is asked (`rlhf-recipes judge`)."""

    models: Annotated[list[str], Field(min_length=2, max_length=2)] | None = None
    """Names of two of eval's models, `[a, b]`; b may be `reference`, the data's own completions. None: `[ppo, rloo]`,
    or the one of them that there is against `sft`."""
    backend: Literal["openai", "anthropic", "local", "reward_model"] = "openai"
    """`openai`: any endpoint with OpenAI's chat completions; `local`: a causal language model on this machine, whose
    next token decides; `reward_model`: the higher score wins."""
    model: str | None = None
    """The endpoint's name of a model; a model reference for `local` and `reward_model`."""
    base_url: str | None = None
    """Of an endpoint that is not the vendor's, such as `http://localhost:8000/v1`. None: what `OPENAI_BASE_URL` or
    `ANTHROPIC_BASE_URL` says, or else the vendor's."""
    criterion: str = (
        "The better completion does what the prompt asks for, is correct, and reads well. Neither its length nor the "
        "order in which the two are shown makes it better."
    )
    """What `better` means, put to every judge that reads; write your task's own, such as `The better summary ...`."""
    num_prompts: int | None = Field(default=None, gt=0)
    """The first so many of eval's prompts, whose order is random. None: all."""
    max_new_tokens: int = Field(default=16, gt=0)
    """Of an answer: one word and some decoration. A model that thinks first needs thousands."""
    parameters: dict[str, Any] = {"temperature": 0}
    """Sent with every request under the endpoint's own names. The default makes answers as repeatable as the endpoint
    allows; yours take its place whole, since some models refuse a temperature: `{reasoning_effort: low}`."""
    workers: int = Field(default=8, gt=0)
    """Requests under way at once: one answer takes about a second, most of it waiting."""
    requests_per_minute: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Most requests begun in a minute, evenly spaced, retries among them. None: no limit of ours; an endpoint's own is
    kept by waiting as long as it says."""
    max_retries: int = Field(default=8, ge=0)
    """Tries after the first, with growing pauses of up to 8 s or as long as the endpoint says: about a minute, within
    which most limits are over."""
    timeout: float = Field(default=60, gt=0, allow_inf_nan=False)
    """Seconds without a sign of the endpoint before a try is given up; a short answer takes a few."""
    price_per_million_tokens: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    """Of tokens `[in, out]`, in any currency. None: no cost is shown, for prices change and differ."""
    batch_size: int = Field(default=8, gt=0)
    """Texts a forward pass of `local` and `reward_model`; judges read long texts."""

    @field_validator("base_url")
    @classmethod
    def _no_secrets(cls, url: str | None) -> str | None:
        if url is not None:
            check_url(url)
        return url


def check_url(url: str) -> None:
    """Refuse an endpoint's address that is none, or that may hold a secret; what it is stays unsaid.

    Raises:
        ValueError: Addresses are written to files, and keys belong into the environment.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("the address of an endpoint begins with http:// or https:// and a host")
    try:
        _ = parts.port, parts.hostname.encode("idna")
    except ValueError:
        raise ValueError("the address of an endpoint has a host or a port that cannot be") from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            "the address of an endpoint is written to files, so it must not hold a user name, a password or a query; a "
            "key belongs into the environment (OPENAI_API_KEY, ANTHROPIC_API_KEY)"
        )


class Expected(Section):
    """One number that a run of the recipe should reach."""

    stage: Literal["sft", "reward", "ppo", "rloo"] | None = None
    """The stage whose model has it. None: ppo and rloo alike."""
    metric: str
    """Name of a metric, such as `score_mean`."""
    start: float | None = None
    """Its value before training. None: not known."""
    end: float | Annotated[list[float], Field(min_length=2, max_length=2)]
    """Its value after training, or `[low, high]`."""
    by: Literal["theirs", "ours"]
    """Who measured it: `theirs`, the source; `ours`, this code."""
    source: str | None = None
    """Where the number comes from. None: the recipe's source."""

    @field_validator("metric")
    @classmethod
    def _current_name(cls, metric: str) -> str:
        if metric in RENAMED_METRICS:
            raise ValueError(f"the metric {metric} is called {RENAMED_METRICS[metric]}")
        return metric


class About(Section):
    """Facts about a recipe for its reader, which no stage depends on."""

    hardware: str | None = None
    """The machine that it fits. None: not known."""
    minutes: float | None = Field(default=None, gt=0)
    """Time of all stages on this machine. None: not measured."""
    source: str | None = None
    """Where its numbers are from. The table of recipes shows the part before the first semicolon."""
    expected: list[Expected] = []
    """Results of a run; a single one needs no list."""

    @field_validator("expected", mode="before")
    @classmethod
    def _one_or_several(cls, expected: Any) -> Any:
        return [expected] if isinstance(expected, dict) else expected


class Recipe(Section):
    """One task: its data, its score and its stages."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Also the name of the run folder."""
    description: str
    """One line, shown by `rlhf-recipes list`."""
    about: About = About()
    """Not part of any stage's settings: a change makes no run another one. Children do not inherit it."""
    seed: int = 42
    runs_dir: str = "runs"
    """Runs are written to `<runs_dir>/<name>/<stage>/`."""
    data: Data
    special_tokens: dict[Literal["pad_token", "eos_token"], str] = {}
    """For tokenizers that lack one, such as `{pad_token: "[PAD]"}`; a token that is not in the vocabulary is added. A
    tokenizer without a pad token otherwise pads with EOS, one without EOS is refused."""
    trust_remote_code: list[str] = []
    """Model references whose own Python code may run."""
    reward_funcs: list[RewardFunc] = Field(min_length=1)
    """The score is their weighted sum: one for ppo, rloo and eval, so that the comparison is fair."""
    missing_eos: MissingEos | None = None
    """For ppo and rloo alike; eval reports the plain score and `eos_rate`. None: a cut-off completion scores what the
    reward functions say."""
    episodes: int | None = Field(default=None, gt=0)
    """Completions that each of ppo and rloo samples in training: equal budgets. None: the trainer's epochs or steps."""
    sft: Sft | None = None
    reward: Reward | None = None
    ppo: Ppo | None = None
    rloo: Rloo | None = None
    eval: Eval = Eval()
    judge: Judge = Judge()

    def stages(self) -> list[str]:
        """Names of the stages that this recipe has, in the order in which they run."""
        return [stage for stage in STAGES if stage == "compare" or getattr(self, stage) is not None]
