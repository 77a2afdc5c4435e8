"""The work of every on-policy stage: from the recipe to the trained policy."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from rlhf_recipes.data.rows import load_rows
from rlhf_recipes.data.shapes import prompts, warn_of_known_prompts
from rlhf_recipes.data.tokenizer import load_tokenizer
from rlhf_recipes.models.dropout import switch_on
from rlhf_recipes.models.limits import check_context
from rlhf_recipes.models.start import Start
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.rewards.registry import build_reward_funcs
from rlhf_recipes.runs.callbacks import attach, save_model
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.trainers.args import trainer_args
from rlhf_recipes.trainers.collapse import signs_of_collapse
from rlhf_recipes.trainers.on_policy import OnPolicyTrainer
from rlhf_recipes.trainers.stop_early import StopEarly


def train_policy(run: Run, trainer_class: type[OnPolicyTrainer], **more: Any) -> str:
    """Trains the policy of a run, saves it, and returns the results in one line.

    Args:
        run: A started run.
        trainer_class: The algorithm.
        more: The algorithm's own arguments of the trainer.
    """
    recipe, section, key = run.recipe, getattr(run.recipe, run.stage), f"{run.stage}.policy"
    args = trainer_args(run, trainer_class.config_class)
    start = Start(run, args, "policy")
    reward_funcs = build_reward_funcs(recipe, recipe.reward_funcs)
    tokenizer = load_tokenizer(recipe, key, section.policy)
    rows, held_out = load_rows(recipe.data, recipe.seed)
    warn_of_known_prompts(recipe.data, rows, held_out)
    train = prompts(recipe.data, rows, tokenizer, recipe.seed)
    _check_enough_prompts(run, args, train)
    check_context(recipe, key, section.policy, train, tokenizer, args.max_completion_length)
    if section.is_watched:
        held_out = prompts(recipe.data, held_out, tokenizer, recipe.seed).shuffle(seed=recipe.seed)
        # From the end of the order from whose beginning eval takes its own.
        more["eval_dataset"] = held_out.select(range(max(0, len(held_out) - WATCHED), len(held_out)))
    trainer = start.trainer(trainer_class, tokenizer, reward_funcs=reward_funcs, train_dataset=train, **more)
    if section.is_watched and (specs := recipe.eval.held_out_funcs):
        functions = build_reward_funcs(recipe, specs, key="eval.held_out_funcs")
        trainer.held_out = functions, torch.tensor([spec.weight for spec in specs])
    stop = StopEarly(section.stop_when)
    trainer.add_callback(stop)
    callback = attach(trainer, run)
    trainer.train(run.checkpoint and str(run.checkpoint))
    switch_on(trainer.rates_of_dropout)  # the saved configuration is the one that the policy came with
    save_model(trainer, run)
    if section.keep_best is not None:
        best = Path(trainer.state.best_model_checkpoint or "").name
        run.findings.append(f"the model is that of {best}: the best {section.keep_best}")
    if stop.reason is not None:
        run.findings.append(f"stopped early: {stop.reason}")
    run.findings += signs_of_collapse(callback.scores, callback.last, trainer.sampled_completions(WATCHED))
    return callback.summary()


WATCHED = 64
"""Held-out prompts on which every checkpoint is measured, and completions in which signs of collapse are looked for."""


def _check_enough_prompts(run: Run, args: Any, prompts: Dataset) -> None:
    """Refuses data with fewer prompts than one rollout takes: TRL would train for no step.

    Raises:
        RecipeError: With the number of prompts, and the number that a rollout needs.
    """
    needed = args.generation_batch_size // args.num_generations
    if len(prompts) < needed:
        raise RecipeError(
            f"data: {run.recipe.data.path} gives {len(prompts)} training prompts, but one rollout takes {needed} "
            f"({args.generation_batch_size} completions, {args.num_generations} per prompt); lower "
            f"{run.stage}.trainer.per_device_train_batch_size or steps_per_generation."
        )
