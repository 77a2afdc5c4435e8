"""The sections of a recipe that several stages share: their keys, with meaning and defaults."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

LARGEST = 1e18
"""Largest size of a score and of a weight: their product, and a score's square, are finite in float32."""

CALL_KEYWORDS = ("prompts", "completions", "completion_ids", "finished", "trainer_state", "log_extra", "log_metric")
"""Arguments of a reward function that a call fills in; the others are columns of the data, or `args` in the recipe."""

Range = Annotated[list[int], Field(min_length=2, max_length=2)]


class Section(BaseModel):
    """A section of a recipe. It refuses unknown keys and converts no types: `seed: "42"` is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Data(Section):
    """The rows, and how prompts and texts are made from them.

    Rows need one of these sets of columns: `prompt` (text or chat messages), with `completion` for `sft`; `text`, whose
    first tokens or words are the prompt, with `label` 0/1 for `reward`; for `sft` alone `messages`; for `reward` `chosen`
    and `rejected`, or `completion_0`, `completion_1` and `choice` (0 or 1: the chosen one).
    """

    path: str
    """Hub id, local file (jsonl, json, csv, parquet; also one beside the recipe), local folder, or `package:NAME/FILE` of an
    installed package."""
    config: str | None = None
    """Configuration of a Hub data set; `datasets` calls it `name`."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    train_split: str = "train"
    """Split of the training rows."""
    eval_split: str | None = None
    """Split of held-out rows. None: `eval_fraction` of the training rows, always the same ones, are held out."""
    eval_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Part of the training rows that is held out where `eval_split` is None."""
    columns: dict[str, str] = {}
    """This project's column name -> its name in the data, such as `{text: review, label: sentiment}`; a path such as
    `info.title` or `summaries.0.text` reaches into a column."""
    filter: dict[str, str | int | float | bool] = {}
    """Column name in the data -> value: only rows with this value are kept."""
    max_rows: int | None = Field(default=None, gt=0)
    """Number of rows of each split, drawn with the recipe's seed. None: all."""
    transform: str | None = None
    """Your own function that makes rows from a batch of the data's rows: `module:function` or `path/to/file.py:function`.
    It takes and returns a dictionary of column name -> list, and `columns` are names in its result. The file may stand
    beside the recipe, as `recipes/film_reviews.py` does. Code elsewhere runs only if you trust it (`docs/security.md`)."""
    prompt_template: str | None = None
    """Makes `prompt` from other columns, such as `"TITLE: {title}\\n\\nPOST: {post}\\n\\nTL;DR:"`."""
    completion_prefix: str = ""
    """Text before every `completion`, `chosen` and `rejected`, such as a space if prompts end without one."""
    max_prompt_tokens: int | None = Field(default=None, gt=0)
    """Longest `prompt` of a row, in tokens of the model. `truncate` shortens longer ones; without it they are left out."""
    truncate: str | None = None
    """Column in `prompt_template` that is shortened until the prompt fits `max_prompt_tokens`: first it loses its last
    paragraphs, then the last characters of the only paragraph that remains."""
    prompt_tokens: Range = [2, 8]
    """Shortest and longest prompt cut from `text`, in tokens of the policy; all lengths are equally likely."""
    prompt_words: Range | None = None
    """The same in words; it replaces `prompt_tokens`."""
    invalid_rows: Literal["refuse", "drop"] = "refuse"
    """Action on rows with an empty prompt or completion, or with two equal texts in a pair; `drop` reports their number."""

    @model_validator(mode="after")
    def _held_out_rows_are_others(self):
        if self.eval_split == self.train_split:
            raise ValueError(
                f"eval_split is {self.eval_split}, the training rows; leave it out to hold eval_fraction out"
            )
        return self

    @model_validator(mode="after")
    def _ranges_ascend(self):
        for name, bounds in (("prompt_tokens", self.prompt_tokens), ("prompt_words", self.prompt_words)):
            if bounds and not 1 <= bounds[0] <= bounds[1]:
                raise ValueError(f"{name} must be two numbers with 1 <= shortest <= longest, not {bounds}")
        return self


class RewardFunc(Section):
    """One term of the score: `weight` times the value of a reward function."""

    name: str
    """A name from `rlhf-recipes rewards`, or `module:function`, or `path/to/file.py:function`. Code that is neither beside the
    recipe nor below the current folder runs only if you trust it (`docs/security.md`)."""
    weight: float = Field(default=1.0, ge=-LARGEST, le=LARGEST, allow_inf_nan=False)
    """Factor in the weighted sum; negative for a penalty."""
    args: dict[str, Any] = {}
    """Keyword arguments of the reward function's factory."""
    timeout: float | None = Field(default=None, gt=0, le=1e6)
    """Longest time of one call, in seconds; a longer call stops the run, whatever the function does. It then runs in a
    process of its own, one for each function and rank, which starts once and holds the function's models; it gets copies
    of its arguments. None: no limit, and no own process."""
