"""The schema of a recipe: the keys of its YAML file, with meaning and defaults.

Every section is closed: an unknown key is an error. `checks` compares the keys under `trainer:`, `peft:` and
`quantization:` with the classes of TRL, peft and transformers.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from rlhf_recipes.recipe.sections import Data, RewardFunc, Section
from rlhf_recipes.recipe.stages import Eval, Judge, OnPolicy, Ppo, Reward, Rloo, Sft, Trained

RENAMED_METRICS = {"judge_mean": "held_out_mean", "judge_positive_share": "held_out_positive_share"}
"""Old name of a metric -> its new name."""


class RecipeError(ValueError):
    """An error in a recipe or its inputs. The message says where it is, what is wrong and how to correct it."""


class MissingEos(Section):
    """Score of a completion that reached the longest length without EOS."""

    mode: Literal["replace", "subtract"]
    """`replace`: the completion scores `value` (Huang et al. 2024, 2403.17031: -1). `subtract`: it scores `value` less than
    the reward functions say (TRL's former `missing_eos_penalty`)."""
    value: float
    """The score of a completion without EOS, or the number that is subtracted from it, as `mode` says."""


class Expected(Section):
    """A number that a run of the recipe should reach."""

    stage: str | None = None
    """The stage whose model is measured. None: both ppo and rloo."""
    metric: str
    """Name of a metric, such as `score_mean`."""
    start: float | None = None
    """Its value before training. None: not known."""
    end: float | Annotated[list[float], Field(min_length=2, max_length=2)]
    """Its value after training, or `[low, high]`."""
    by: Literal["theirs", "ours"]
    """Who measured it: `theirs`, the source; `ours`, this project."""
    source: str | None = None
    """Source of the number. None: the recipe's source."""

    @field_validator("stage")
    @classmethod
    def _stage_that_trains(cls, stage: str | None) -> str | None:
        if stage is not None and stage not in TRAINED:
            raise ValueError(f"the stage should be one of {', '.join(TRAINED)}, not {stage!r}")
        return stage

    @field_validator("metric")
    @classmethod
    def _current_name(cls, metric: str) -> str:
        if metric in RENAMED_METRICS:
            raise ValueError(f"the metric {metric} is called {RENAMED_METRICS[metric]}")
        return metric


class About(Section):
    """Facts about a recipe for its reader; no stage depends on them."""

    hardware: str | None = None
    """The machine that the recipe fits. None: not known."""
    minutes: float | None = Field(default=None, gt=0)
    """Minutes for all stages on this machine. None: not measured."""
    source: str | None = None
    """Source of the recipe's numbers. The table of recipes shows the part before the first semicolon."""
    expected: list[Expected] = []
    """Results of a run; a single one needs no list."""

    @field_validator("expected", mode="before")
    @classmethod
    def _one_or_several(cls, expected: Any) -> Any:
        return [expected] if isinstance(expected, dict) else expected


class Recipe(Section):
    """A task: its data, its score and its stages."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Also the name of the run folder."""
    description: str
    """One line, shown by `rlhf-recipes list`."""
    about: About = About()
    """No stage's settings contain it, so a change makes no run outdated. Children do not inherit it."""
    seed: int = 42
    """Seed of the data order, of sampling and of new weights, in every stage."""
    runs_dir: str = Field(default="runs", pattern=r"^[^/]{0,200}(/[^/]{0,200})*$")  # a system's names have 255 bytes
    """Runs are written to `<runs_dir>/<name>/<stage>/`."""
    data: Data
    special_tokens: dict[Literal["pad_token", "eos_token"], str] = {}
    """Tokens for a tokenizer that lacks them, such as `{pad_token: "[PAD]"}`; a token that is not in the vocabulary is added.
    Otherwise a tokenizer without a pad token pads with EOS, and a tokenizer without EOS is refused."""
    chat_template_kwargs: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], str | bool | int | float] = {}
    """Variables of the chat template, such as `{enable_thinking: false}`, the same in all stages and eval. They become a part of
    the template that is saved with a trained model."""
    trust_remote_code: list[str] = []
    """Ids of models whose own Python code may run, if you trust them too (`docs/security.md`)."""
    reward_funcs: list[RewardFunc] = Field(min_length=1)
    """The score is their weighted sum. It is the same for ppo, rloo and eval, so that the comparison is fair."""
    missing_eos: MissingEos | None = None
    """The same for ppo and rloo; eval reports the plain score and `eos_rate`. None: a completion without EOS has the score of
    the reward functions."""
    episodes: int | None = Field(default=None, gt=0)
    """Completions that ppo and rloo each sample in training: equal budgets. None: the trainer's epochs or steps."""
    sft: Sft | None = None
    reward: Reward | None = None
    ppo: Ppo | None = None
    rloo: Rloo | None = None
    eval: Eval = Eval()
    judge: Judge = Judge()

    @model_validator(mode="after")
    def _held_out_score(self):
        for stage in self.on_policy_stages():
            section = getattr(self, stage)
            if not self.eval.held_out_funcs and (
                section.keep_best == "held_out_mean" or section.stop_when.held_out_falls
            ):
                key = "keep_best" if section.keep_best == "held_out_mean" else "stop_when.held_out_falls"
                raise ValueError(f"{stage}.{key}: there is no held-out score; set eval.held_out_funcs")
        return self

    def stages(self) -> list[str]:
        """Names of the recipe's stages, in the order in which they run."""
        return [stage for stage in STAGES if stage == "compare" or getattr(self, stage) is not None]

    def on_policy_stages(self) -> list[str]:
        """Names of the recipe's algorithms, such as ppo and rloo."""
        return [stage for stage in ON_POLICY if getattr(self, stage) is not None]


TRAINED: dict[str, type[Trained]] = {
    name: kind
    for name, field in Recipe.model_fields.items()
    for kind in get_args(field.annotation)
    if isinstance(kind, type) and issubclass(kind, Trained)
}
"""Stage that trains -> the class of its section. The fields of `Recipe` are the one list of these stages."""

ON_POLICY = tuple(name for name, section in TRAINED.items() if issubclass(section, OnPolicy))
"""Stages that train a policy on its own samples: the algorithms that are compared."""

STAGES = (*TRAINED, "eval", "compare")
"""Stages in the order in which `run` starts them."""
