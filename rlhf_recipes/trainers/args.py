"""The arguments of a stage's trainer: the keys of the recipe's `trainer:`, then defaults that fit this machine."""

import inspect
import logging
import math
import os
from typing import Any

from datasets import Dataset
from transformers import SchedulerType, TrainingArguments
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from rlhf_recipes.launch.checks import check_setup
from rlhf_recipes.launch.setup import asked, launched
from rlhf_recipes.models import hardware as machine
from rlhf_recipes.recipe.batch import batch_settings, rows_of_step
from rlhf_recipes.recipe.checks import refuse_unknown
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.recipe.stages import OnPolicy
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.runs.trackers import PROJECT, chosen_trackers, run_name

logger = logging.getLogger(__name__)

OF_TRAINER = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
"""Arguments of a schedule that the trainer fills in."""

# Ten checkpoints per run: a killed run loses at most a tenth of its work.
DEFAULTS = {"logging_steps": 10, "save_steps": 0.1, "project": PROJECT}
"""Defaults that replace TRL's; a recipe may set other values."""


def trainer_args(run: Run, config_class: type[TrainingArguments]) -> TrainingArguments:
    """The trainer's arguments for one stage.

    Raises:
        RecipeError: TRL or transformers refuses a value; the message is the key and theirs.
    """
    section, wanted = getattr(run.recipe, run.stage), asked()
    given = section.trainer | batch_settings(run.recipe, run.stage, launched().num_processes)
    precision = wanted and wanted.mixed_precision
    fitting = machine.settings(run.stage, section, precision)
    values = DEFAULTS | fitting | {"save_total_limit": 2} | given
    values |= {
        "output_dir": str(run.path),
        "seed": run.recipe.seed,
        "run_name": run_name(run.recipe, run.stage),
        "report_to": chosen_trackers(run.stage, given.get("report_to")),
        "disable_tqdm": True,
    }
    if isinstance(section, OnPolicy):
        values["reward_weights"] = [spec.weight for spec in run.recipe.reward_funcs]
        values["missing_eos"] = run.recipe.missing_eos and run.recipe.missing_eos.model_dump()
        if section.is_watched:
            values |= {"eval_strategy": "steps", "eval_steps": values["save_steps"], "num_generations_eval": 1}
        if section.keep_best is not None:
            best = {"load_best_model_at_end": True, "metric_for_best_model": f"eval_{section.keep_best}"}
            values |= best | {"greater_is_better": True}
        own = type(section).model_fields.keys() & config_class.__dataclass_fields__.keys()  # such as rloo's baseline
        values |= {key: getattr(section, key) for key in own}
    if token := values.pop("hub_token", None):
        os.environ["HF_TOKEN"] = token  # huggingface_hub reads it; a trainer's arguments are saved in checkpoints
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.path / "tensorboard")
    try:
        args = config_class(**values)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        message = str(error)[:500]
        about_a_setting = message.partition(" ")[0] in config_class.__dataclass_fields__
        raise RecipeError(f"{run.stage}.trainer{'.' if about_a_setting else ': '}{message}") from error
    _check_schedule(run.stage, args)
    check_setup(args)
    run.check_precision(args.mixed_precision)
    if args.n_gpu > 1:  # transformers would use all GPUs in one process, by DataParallel
        logger.warning("one process trains on one GPU of %d: --accelerate-config ddp_8gpu uses more GPUs.", args.n_gpu)
        args._n_gpu = 1
    if isinstance(section, OnPolicy):
        if "logging_steps" not in given:
            args.logging_steps = args.steps_per_rollout  # one line per rollout, the only steps with a new score
        if run.recipe.episodes is not None:
            _set_budget(run, args, given)
        if 0 < args.max_steps < args.logging_steps:
            raise RecipeError(
                f"{run.stage}.trainer.logging_steps: {args.logging_steps:g} is more than the {args.max_steps} steps of the "
                "training, of which nothing would be logged."
            )
    return args


def _check_schedule(stage: str, args: TrainingArguments) -> None:
    """Refuses `lr_scheduler_kwargs` that the schedule does not have, or that it needs and does not get."""
    schedule, given = TYPE_TO_SCHEDULER_FUNCTION[args.lr_scheduler_type], args.lr_scheduler_kwargs or {}
    known = {name: p for name, p in inspect.signature(schedule).parameters.items() if name not in OF_TRAINER}
    where, name = f"{stage}.trainer.lr_scheduler_kwargs", SchedulerType(args.lr_scheduler_type).value
    refuse_unknown(where, given, known, name)
    needed = [
        key for key, p in known.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD and key not in given
    ]
    if needed:
        raise RecipeError(f"{where}: {name} needs {', '.join(needed)}.")


def rows_of_training(args: TrainingArguments, rows: Dataset) -> Dataset:
    """The first rows, as many as `max_steps` steps take."""
    return rows.select(range(min(len(rows), args.max_steps * rows_of_step(vars(args), args.world_size))))


def _set_budget(run: Run, args: Any, given: dict[str, Any]) -> None:
    """Sets `max_steps` to the recipe's `episodes`, in whole rollouts, unless `trainer` sets the duration."""
    episodes, of_rollout = run.recipe.episodes, args.generation_batch_size
    if own := sorted({"max_steps", "num_train_epochs"} & given.keys()):
        if run.is_main:
            logger.warning(
                "%s.trainer.%s: it replaces episodes (%d), so ppo and rloo may have unequal budgets; remove one.",
                run.stage,
                own[0],
                episodes,
            )
    elif episodes < of_rollout:
        raise RecipeError(
            f"episodes: {episodes} is less than one rollout of {of_rollout} completions; raise it, or lower "
            f"{run.stage}.trainer.per_device_train_batch_size ({args.per_device_train_batch_size}) or "
            f"steps_per_generation ({args.steps_per_generation})."
        )
    else:
        args.max_steps = args.steps_per_rollout * math.ceil(episodes / of_rollout)
