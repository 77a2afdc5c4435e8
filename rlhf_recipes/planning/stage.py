"""One stage of a recipe on a machine, before it runs: memory at its worst moments, steps, rows and tokens.

Nothing is downloaded but a `config.json` that is not here already, no weights are made, and no GPU is needed.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from rlhf_recipes.models.adapters import lora_of, quantization_of
from rlhf_recipes.planning.architectures import config_of, drops_out
from rlhf_recipes.planning.machine import Launch, Machine
from rlhf_recipes.planning.memory import Batch, Estimate, moments
from rlhf_recipes.planning.trace import model_of
from rlhf_recipes.recipe.batch import TEXTS_OF_ROW, batch_settings, rows_of_rollout, rows_of_step, steps_of_rollout
from rlhf_recipes.recipe.schema import Recipe, RecipeError
from rlhf_recipes.runs.inputs import OWN_VALUE_MODELS
from rlhf_recipes.runs.references import loading
from rlhf_recipes.trainers.config import OnPolicyConfig

PPO_DEFAULTS = {"num_generations": 1}
"""What `PPOConfig` has of the settings that count here and `OnPolicyConfig` has otherwise; to import it takes seconds."""

COUNTS = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "generation_batch_size",
    "sampling_batch_size", "num_generations", "num_iterations", "max_completion_length", "max_length",
)  # fmt: skip
"""Settings that are multiplied and divided by here; the trainers refuse what is not above 0, too, but are not asked."""


@dataclass(frozen=True)
class Work:
    """The amount of work in a stage; None where it depends on the data."""

    rows: int | None
    """Texts (sft), pairs (reward) or episodes (ppo, rloo), over all epochs."""
    steps: int | None
    tokens: int | None
    """At most."""
    at_most: bool
    """Whether rows and steps may be fewer, because the data may have less."""


@dataclass(frozen=True)
class StagePlan:
    """A stage on a machine."""

    stage: str
    machine: Machine
    launch: Launch
    batch: Batch
    moments: dict[str, Estimate]
    otherwise: float
    """Total with gradient checkpointing, if it is off, or without, if it is on."""
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
        """True if gradient checkpointing is on, and the stage fits without it."""
        return self.batch.checkpointing and self.otherwise <= self.machine.bytes - self.machine.reserve

    @property
    def fits(self) -> bool:
        return self.headroom >= 0


def settings_of(recipe: Recipe, stage: str, processes: int) -> dict[str, Any]:
    """A stage's trainer settings: the recipe's, and defaults of the trainer's own configuration class.

    Raises:
        RecipeError: The processes cannot share the global batch, or a number is not above 0.
    """
    from trl import RewardConfig, SFTConfig

    config_class = {"sft": SFTConfig, "reward": RewardConfig}.get(stage, OnPolicyConfig)
    own = PPO_DEFAULTS if stage == "ppo" else {}
    defaults = {field.name: field.default for field in fields(config_class) if field.default is not MISSING}
    section = getattr(recipe, stage)
    findings = []
    for name in set(COUNTS) & set(section.trainer):
        value = section.trainer[name]
        optional = name == "max_length" or defaults[name] is None
        if (value is None and not optional) or (value is not None and value < 1):
            findings.append(f"{stage}.trainer.{name}: must be above 0, not {'null' if value is None else value}.")
    if findings:
        raise RecipeError("\n".join(sorted(findings)))
    return defaults | own | section.trainer | batch_settings(recipe, stage, processes)


def plan_stage(recipe: Recipe, stage: str, machine: Machine, launch: Launch) -> StagePlan:
    """Memory and work of one stage.

    Raises:
        RecipeError: A model's configuration is not to be had, or it cannot be followed.
    """
    section, settings, notes = getattr(recipe, stage), settings_of(recipe, stage, machine.count), []
    if launch.device != "cpu" and section.trainer.get("bf16") is False and not section.trainer.get("fp16"):
        launch = replace(launch, half=False)
    name = "policy" if stage in ("ppo", "rloo") else "model"
    reference = getattr(section, name)
    where = f"{stage}.{name}"
    config, start = config_of(recipe, where, "stage:sft" if reference is None else reference)
    if stage == "sft" and reference is None:
        start = None
    if stage != "reward" and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise RecipeError(
            f"{where}: {reference} is a {config.model_type} model, which writes no text; set a language model."
        )
    peft = None
    if section.peft is not None:
        peft = start if start is not None and stage != "reward" else lora_of(stage, section.peft)
    quantization = None
    if section.quantization is not None:
        quantization = quantization_of(stage, section.quantization, "bfloat16" if launch.half else "float32")
    dropout = stage == "sft" and drops_out(config)
    batch = _batch(recipe, stage, settings, config, machine.count, notes)
    value, reward_models = None, ()
    how = {
        "classifier": stage == "reward",
        "peft_config": peft,
        "quantization_config": quantization,
        "dropout": dropout,
    }
    if stage in ("ppo", "rloo"):
        batch = replace(batch, reference=settings["beta"] != 0 and peft is None)
        value = _value_config(recipe, config) if stage == "ppo" else None
    with _followed(stage):
        if stage in ("ppo", "rloo"):
            reward_models = tuple(
                replace(
                    model_of(scorer, Launch(half=half, device=launch.device), classifier=True, trained=False),
                    loaded_bytes=2 if half else 4,
                )
                for scorer, half in _reward_model_configs(recipe, notes)
            )
        with loading(f"{stage}.peft", config.model_type):  # that names layers which are not there
            policy = model_of(config, launch, **how)
        network = value and model_of(value, launch, classifier=True)
    found = {
        flag: moments(policy, replace(batch, checkpointing=flag), launch, network, reward_models)
        for flag in (False, True)
    }
    given = section.trainer.get("gradient_checkpointing")
    totals = {flag: max(moment.total for moment in of_flag.values()) for flag, of_flag in found.items()}
    checkpointing = given if given is not None else machine.device != "cpu"
    return StagePlan(
        stage=stage,
        machine=machine,
        launch=launch,
        batch=replace(batch, checkpointing=checkpointing),
        moments=found[checkpointing],
        otherwise=totals[not checkpointing],
        work=_work(recipe, stage, settings, batch, machine.count),
        notes=notes,
    )


@contextmanager
def _followed(stage: str) -> Iterator[None]:
    """Around models that are followed without weights: of one that cannot be, whatever it raises is one sentence."""
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(
            f"{stage}: plan cannot follow one of its models ({type(error).__name__}: {str(error)[:200]}); the stage itself "
            "may run."
        ) from error


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
            raise RecipeError(f"{stage}.trainer.max_length: set it; nothing else says how long texts may be.")
        return Batch(rows=rows * TEXTS_OF_ROW[stage], prompt=int(longest), completion=0, **common)
    completion = settings["max_completion_length"]
    if completion >= context:
        raise RecipeError(
            f"{stage}.trainer.max_completion_length is {completion}, but the model reads {context} tokens at most, prompt "
            "included; set it to less."
        )
    prompt = _prompt_tokens(recipe, stage, context, completion, notes)
    rollout = rows_of_rollout(settings, processes, f"{stage}.trainer.") // processes
    if settings["use_vllm"]:
        notes.append(f"{stage}: what vLLM keeps on the same GPUs is not counted; sampling is planned as without it.")
    sampled = min(settings["sampling_batch_size"] or rollout, rollout)
    return Batch(rows=rows, prompt=prompt, completion=completion, rollout=rollout, sampled=sampled, **common)


def _prompt_tokens(recipe: Recipe, stage: str, context: float, completion: int, notes: list[str]) -> int:
    data = recipe.data
    if data.max_prompt_tokens is not None:
        return data.max_prompt_tokens
    if data.prompt_template is None and "prompt" not in data.columns:
        if data.prompt_words is None:
            return data.prompt_tokens[1]
        notes.append(f"{stage}: two tokens a word of data.prompt_words are assumed.")
        return 2 * data.prompt_words[1]
    longest = int(min(context - completion, 1024))
    notes.append(
        f"{stage}: prompts of {longest} tokens are assumed; data.max_prompt_tokens would say how long they are."
    )
    return longest


def _value_config(recipe: Recipe, policy: Any) -> Any:
    source = recipe.ppo.value_model
    if source in OWN_VALUE_MODELS:
        return policy if source == "policy" else None
    return config_of(recipe, "ppo.value_model", source)[0]


def _reward_model_configs(recipe: Recipe, notes: list[str]) -> Iterator[tuple[Any, bool]]:
    """Configuration of every model that scores, and whether it is loaded in half precision."""
    for i, spec in enumerate(recipe.reward_funcs):
        model = spec.args.get("model")
        if spec.name in ("reward_model", "sentiment") and isinstance(model, str):
            half = spec.args.get("dtype") in ("bfloat16", "float16")
            yield config_of(recipe, f"reward_funcs.{i}.args.model", model)[0], half
        elif ":" in spec.name:
            notes.append(f"reward_funcs.{i}: what {spec.name} keeps in memory is not counted.")


def _work(recipe: Recipe, stage: str, settings: dict[str, Any], batch: Batch, processes: int) -> Work:
    section, given = getattr(recipe, stage), getattr(recipe, stage).trainer
    of_step = rows_of_step(settings, processes)
    max_steps, epochs = settings["max_steps"], settings["num_train_epochs"]
    if stage in ("sft", "reward"):
        data = (section.data if stage == "reward" else None) or recipe.data
        number, at_most = (section.pairs, True) if stage == "reward" and section.pairs else (data.max_rows, True)
        if max_steps > 0:
            rows, steps, at_most = max_steps * of_step, max_steps, False
        elif number is not None:
            rows, steps = math.ceil(number * epochs), math.ceil(math.ceil(number / of_step) * epochs)
        else:
            return Work(None, None, None, True)
        return Work(rows, steps, rows * TEXTS_OF_ROW[stage] * batch.prompt, at_most)
    of_rollout = batch.rollout * processes
    of_one = steps_of_rollout(settings, of_rollout, processes)
    if max_steps > 0:
        rollouts, steps = math.ceil(max_steps / of_one), max_steps
    elif recipe.episodes is not None and "num_train_epochs" not in given:
        rollouts = math.ceil(recipe.episodes / of_rollout)
        steps = rollouts * of_one
    elif recipe.data.max_rows is not None:
        rollouts = math.floor(recipe.data.max_rows * settings["num_generations"] / of_rollout * epochs)
        episodes = rollouts * of_rollout
        return Work(episodes, rollouts * of_one, episodes * (batch.prompt + batch.completion), True)
    else:
        return Work(None, None, None, True)
    episodes = rollouts * of_rollout
    return Work(episodes, steps, episodes * (batch.prompt + batch.completion), False)
