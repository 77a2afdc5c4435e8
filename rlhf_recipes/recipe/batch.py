"""Sizes of an optimizer step and of a rollout.

They are counted in rows: a row is a text (sft), a pair of texts (reward) or a completion (ppo, rloo). `settings` are
`trainer_settings`, or the arguments of a trainer.
"""

from collections.abc import Mapping
from typing import Any

from rlhf_recipes.recipe.schema import Recipe, RecipeError
from rlhf_recipes.recipe.trainer_keys import trainer_defaults

TEXTS_OF_ROW = {"sft": 1, "reward": 2}
"""Stage -> texts in each row."""

TRANSFORMERS_BATCH_SIZE = 8
"""transformers' default of `per_device_train_batch_size`."""


def batch_settings(recipe: Recipe, stage: str, processes: int) -> dict[str, int]:
    """The `trainer` keys that follow from a stage's `global_batch_size`; {} if the stage has none.

    Raises:
        RecipeError: The processes cannot share the batch equally.
    """
    section = getattr(recipe, stage)
    if section.global_batch_size is None:
        return {}
    share, rest = divmod(section.global_batch_size, processes)
    if rest:
        raise RecipeError(
            f"{stage}.global_batch_size: {section.global_batch_size} cannot be divided by {processes} processes; set a "
            f"multiple of {processes}, or launch another number of processes."
        )
    most = max(section.trainer.get("per_device_train_batch_size", TRANSFORMERS_BATCH_SIZE), 1)
    size = max(n for n in range(1, min(most, share) + 1) if share % n == 0)
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": share // size}


def trainer_settings(recipe: Recipe, stage: str, processes: int) -> dict[str, Any]:
    """A stage's `trainer` with its defaults filled in, as far as they are plain values.

    Raises:
        RecipeError: The processes cannot share the batch equally.
    """
    return trainer_defaults(stage) | getattr(recipe, stage).trainer | batch_settings(recipe, stage, processes)


def rows_of_step(settings: Mapping[str, Any], processes: int) -> int:
    """Rows of one optimizer step over all processes."""
    return settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] * processes


def rows_of_rollout(settings: Mapping[str, Any], processes: int, key: str = "") -> int:
    """Completions of one rollout over all processes.

    Args:
        settings: Of ppo or rloo, before TRL derives `generation_batch_size` and `steps_per_generation` from each other.
        processes: Number of processes.
        key: Stands before each setting in messages, such as `ppo.trainer.`.

    Raises:
        RecipeError: A rollout is not a whole number of micro-batches, of prompts, or of optimizer steps.
    """
    rows, accumulation = settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"]
    rollout, micro_batches = settings["generation_batch_size"], settings["steps_per_generation"]
    if rollout is not None and micro_batches is not None:
        raise RecipeError(f"{key}generation_batch_size and steps_per_generation are both set; set only one of them.")
    if rollout is None:
        rollout = rows * (micro_batches or accumulation) * processes
    elif rollout % (rows * processes):
        raise RecipeError(
            f"{key}generation_batch_size ({rollout}) must be divisible by per_device_train_batch_size ({rows}) x processes "
            f"({processes}); change one of them."
        )
    micro_batches = rollout // (rows * processes)
    if rollout % settings["num_generations"]:
        raise RecipeError(
            f"{key}num_generations ({settings['num_generations']}): the {rollout} completions of a rollout are not divisible "
            f"by it; they are per_device_train_batch_size ({rows}) x steps_per_generation ({micro_batches}) x processes "
            f"({processes}), so change one of these."
        )
    if micro_batches % accumulation:
        raise RecipeError(
            f"{key}steps_per_generation ({micro_batches}) must be a multiple of gradient_accumulation_steps ({accumulation}): "
            "a rollout is a whole number of optimizer steps."
        )
    return rollout


def steps_of_rollout(settings: Mapping[str, Any], rollout: int, processes: int) -> int:
    """Optimizer steps between one rollout of this many completions and the next."""
    return rollout // rows_of_step(settings, processes) * settings["num_iterations"]
