"""The plan of one stage on a machine: memory at its worst moments, steps, rows and tokens.

It needs no weights and no GPU, and downloads only a missing `config.json`.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from transformers import TrainingArguments

from rlhf_recipes.models.adapters import lora_of, quantization_of
from rlhf_recipes.planning.architectures import config_of, drops_out
from rlhf_recipes.planning.machine import Launch, Machine
from rlhf_recipes.planning.memory import Batch, Estimate, moments
from rlhf_recipes.planning.models import Model, model_of
from rlhf_recipes.recipe.batch import TEXTS_OF_ROW, rows_of_rollout, rows_of_step, steps_of_rollout, trainer_settings
from rlhf_recipes.recipe.schema import ON_POLICY, Recipe, RecipeError
from rlhf_recipes.recipe.trainer_keys import trainer_defaults
from rlhf_recipes.runs.references import loading
from rlhf_recipes.trainers.config import POSITIVE


@dataclass(frozen=True)
class Work:
    """The amount of work in a stage; None if the recipe does not limit the rows of the data."""

    rows: int | None
    """Texts (sft), pairs (reward) or episodes (ppo, rloo), over all epochs."""
    steps: int | None
    tokens: int | None
    """Upper bound."""
    at_most: bool
    """True if rows and steps are upper bounds, because the data may have fewer rows."""


@dataclass(frozen=True)
class StagePlan:
    """The plan of a stage on a machine."""

    stage: str
    machine: Machine
    launch: Launch
    batch: Batch
    moments: dict[str, Estimate]
    otherwise: float
    """Total with the opposite setting of gradient checkpointing."""
    work: Work
    notes: list[str]

    @property
    def total(self) -> float:
        return max(moment.total for moment in self.moments.values())

    @property
    def headroom(self) -> float:
        return self.machine.bytes - self.machine.reserve - self.total

    @property
    def fits_without(self) -> bool:
        """True if gradient checkpointing is on and the stage fits without it."""
        return self.batch.checkpointing and self.otherwise <= self.machine.bytes - self.machine.reserve

    @property
    def fits(self) -> bool:
        return self.headroom >= 0


def settings_of(recipe: Recipe, stage: str, processes: int) -> dict[str, Any]:
    """A stage's `trainer` with its defaults filled in.

    Raises:
        RecipeError: The processes cannot share the global batch, or a number is not above 0.
    """
    settings = trainer_settings(recipe, stage, processes)
    given = getattr(recipe, stage).trainer
    for name in sorted({*POSITIVE, "max_length"} & given.keys()):
        value, optional = given[name], name == "max_length" or trainer_defaults(stage)[name] is None
        if not optional if value is None else value <= 0:
            raise RecipeError(f"{stage}.trainer.{name}: must be above 0, not {'null' if value is None else value}.")
    return {"optim": TrainingArguments.optim} | settings


def plan_stage(recipe: Recipe, stage: str, machine: Machine, launch: Launch) -> StagePlan:
    """Memory and work of one stage.

    Raises:
        RecipeError: The configuration of a model cannot be loaded, or the planner cannot run the model without weights.
    """
    section, settings, notes = getattr(recipe, stage), settings_of(recipe, stage, machine.count), list[str]()
    if launch.device != "cpu" and section.trainer.get("bf16") is False and not section.trainer.get("fp16"):
        launch = replace(launch, mixed_precision="no")
    on_policy = stage in ON_POLICY
    key = f"{stage}.policy" if on_policy else f"{stage}.model"
    model_id = section.policy if on_policy else section.model
    config, start = config_of(recipe, key, model_id or "stage:sft")
    peft = quantization = None
    if section.peft is not None:
        peft = start if start is not None and model_id and stage != "reward" else lora_of(stage, section.peft)
    if section.quantization is not None:
        quantization = quantization_of(stage, section.quantization, "bfloat16" if launch.half else "float32")
    batch = _batch(recipe, stage, settings, config, machine.count, notes)
    batch = replace(batch, reference=on_policy and settings["beta"] != 0 and peft is None)
    value, reward_models = None, tuple[Model, ...]()
    with _one_sentence(stage):
        with loading(key if peft is None else f"{stage}.peft", model_id or config.model_type):
            policy = model_of(
                config, launch, stage == "reward", stage == "sft" and drops_out(config), peft, quantization
            )
        if stage == "ppo" and (value_id := section.value_model) != "shared":
            value_config = config if value_id == "policy" else config_of(recipe, "ppo.value_model", value_id)[0]
            value = model_of(value_config, launch, classifier=True)
        if on_policy:
            reward_models = tuple(_reward_models(recipe, launch, notes))
    peaks = {
        flag: moments(policy, replace(batch, checkpointing=flag), launch, value, reward_models)
        for flag in (False, True)
    }
    checkpointing = section.trainer.get("gradient_checkpointing")
    checkpointing = machine.device != "cpu" if checkpointing is None else checkpointing
    return StagePlan(
        stage=stage,
        machine=machine,
        launch=launch,
        batch=replace(batch, checkpointing=checkpointing),
        moments=peaks[checkpointing],
        otherwise=max(moment.total for moment in peaks[not checkpointing].values()),
        work=_work(recipe, stage, settings, batch, machine.count),
        notes=notes,
    )


@contextmanager
def _one_sentence(stage: str) -> Iterator[None]:
    """Turn any error inside into a `RecipeError`: a model that runs without weights may raise anything."""
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(
            f"{stage}: plan cannot run one of its models without weights ({type(error).__name__}: {str(error)[:200]}); the "
            "stage itself may run."
        ) from error


def _reward_models(recipe: Recipe, launch: Launch, notes: list[str]) -> Iterator[Model]:
    for i, spec in enumerate(recipe.reward_funcs):
        model_id = spec.args.get("model")
        if spec.name in ("reward_model", "sentiment") and isinstance(model_id, str):
            half = spec.args.get("dtype") in ("bfloat16", "float16")
            precision = replace(launch, zero_stage=None, mixed_precision="bf16" if half else "no")
            config = config_of(recipe, f"reward_funcs.{i}.args.model", model_id)[0]
            yield replace(model_of(config, precision, classifier=True, trained=False), loaded_bytes=2 if half else 4)
        elif ":" in spec.name:
            notes.append(f"reward_funcs.{i}: the memory of {spec.name} is not counted.")


def _batch(
    recipe: Recipe, stage: str, settings: dict[str, Any], config: Any, processes: int, notes: list[str]
) -> Batch:
    rows, accumulation = settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"]
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    optimizer = str(getattr(settings["optim"], "value", settings["optim"]))
    common = {"stage": stage, "accumulation": accumulation, "optimizer": optimizer}
    if stage in ("sft", "reward"):
        longest = min(settings["max_length"] or math.inf, context)
        if longest == math.inf:
            raise RecipeError(f"{stage}.trainer.max_length: set it: the model has no longest text of its own.")
        return Batch(rows=rows * TEXTS_OF_ROW[stage], prompt=int(longest), completion=0, **common)
    completion = settings["max_completion_length"]
    if completion >= context:
        raise RecipeError(
            f"{stage}.trainer.max_completion_length is {completion}, but the model reads {context} tokens at most, "
            "with the prompt; lower it."
        )
    prompt = _prompt_tokens(recipe, stage, context, completion, notes)
    rollout = rows_of_rollout(settings, processes, f"{stage}.trainer.") // processes
    if settings["use_vllm"]:
        notes.append(f"{stage}: the memory of vLLM on the same GPUs is not counted; sampling is planned without vLLM.")
    sampled = min(settings["sampling_batch_size"] or rollout, rollout)
    return Batch(rows=rows, prompt=prompt, completion=completion, rollout=rollout, sampled=sampled, **common)


def _prompt_tokens(recipe: Recipe, stage: str, context: float, completion: int, notes: list[str]) -> int:
    data = recipe.data
    if data.max_prompt_tokens is not None:
        return data.max_prompt_tokens
    if data.prompt_template is None and "prompt" not in data.columns:
        if data.prompt_words is None:
            return data.prompt_tokens[1]
        notes.append(f"{stage}: two tokens per word of data.prompt_words are assumed.")
        return 2 * data.prompt_words[1]
    longest = int(min(context - completion, 1024))
    notes.append(f"{stage}: prompts of {longest} tokens are assumed; data.max_prompt_tokens sets their length.")
    return longest


def _work(recipe: Recipe, stage: str, settings: dict[str, Any], batch: Batch, processes: int) -> Work:
    section, max_steps, epochs = getattr(recipe, stage), settings["max_steps"], settings["num_train_epochs"]
    if stage in ("sft", "reward"):
        of_step, tokens = rows_of_step(settings, processes), TEXTS_OF_ROW[stage] * batch.prompt
        if max_steps > 0:
            return Work(max_steps * of_step, max_steps, max_steps * of_step * tokens, at_most=False)
        data = getattr(section, "data", None) or recipe.data
        number = getattr(section, "pairs", None) or data.max_rows
        if number is None:
            return Work(None, None, None, at_most=True)
        rows = math.ceil(number * epochs)
        return Work(rows, math.ceil(math.ceil(number / of_step) * epochs), rows * tokens, at_most=True)
    of_rollout = batch.rollout * processes
    steps, at_most = steps_of_rollout(settings, of_rollout, processes), False
    if max_steps > 0:
        rollouts = math.ceil(max_steps / steps)
    elif recipe.episodes is not None and "num_train_epochs" not in section.trainer:
        rollouts = math.ceil(recipe.episodes / of_rollout)
    elif recipe.data.max_rows is not None:
        rollouts, at_most = math.floor(recipe.data.max_rows * settings["num_generations"] / of_rollout * epochs), True
    else:
        return Work(None, None, None, at_most=True)
    episodes = rollouts * of_rollout
    steps = max_steps if max_steps > 0 else rollouts * steps
    return Work(episodes, steps, episodes * (batch.prompt + batch.completion), at_most)
