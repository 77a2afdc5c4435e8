"""Checks that the launch has the processes and strategy that the user asked for.

Several launches silently give something else: `distributed_type: MULTI_CPU` gives one process, `use_cpu: true` with
DeepSpeed gives plain DDP, FSDP on a CPU gives plain DDP or a crash. A stage refuses to train in any of them.
"""

import os
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlhf_recipes.launch.setup import Asked, Setup, asked, flag, launched, setup_of
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.system.files import saved_setup


def check_launch(given: dict[str, Any]) -> None:
    """Refuse a launch that differs from the request, before anything is loaded.

    Args:
        given: The stage's `trainer` section.

    Raises:
        RecipeError: The number of processes or the strategy differs from the request, the machine has fewer GPUs than
            processes, or DeepSpeed is not installed.
    """
    wanted, got = asked(), launched()
    if got.kind == "DEEPSPEED" and find_spec("deepspeed") is None:
        raise RecipeError("DeepSpeed is asked for and not installed: pip install 'rlhf-recipes[deepspeed]'")
    if got.kind == "DEEPSPEED" and flag("ACCELERATE_USE_CPU"):
        raise RecipeError(
            "use_cpu: true (or ACCELERATE_USE_CPU) with DeepSpeed gives plain DDP; write use_cpu: false, as "
            "accelerate_configs/cpu_zero2_2.yaml does: without a GPU, the processes run on the CPU all the same."
        )
    if wanted is not None and not wanted.is_like(got):
        raise RecipeError(
            f"{wanted.where}: {wanted} asked for, but this launch gives {got}. `use_cpu: true`, `--cpu` and MULTI_CPU start "
            "one process; for several on a CPU write distributed_type MULTI_GPU (or DEEPSPEED) and use_cpu: false, as "
            "accelerate_configs/cpu_ddp_2.yaml does."
        )
    _require_gpus(wanted, given)


def _require_gpus(wanted: Asked | None, given: dict[str, Any]) -> None:
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpu_ids = (wanted and wanted.gpu_ids) or ""
    hides_gpus, asks_for_gpus = gpu_ids.startswith("-1"), gpu_ids and not gpu_ids.startswith("-1")
    if given.get("use_cpu") or hides_gpus or (here == 1 and not asks_for_gpus):
        return
    import torch

    gpus = torch.accelerator.device_count()
    # Without a GPU, processes run on the CPU unless the request names GPUs or there are more processes than cores.
    if gpus < here and (gpus > 0 or asks_for_gpus or here > (os.cpu_count() or 1)):
        raise RecipeError(
            f"{f'{wanted.where}: ' if wanted else ''}{here} process(es) on this machine's GPUs asked for, and it has {gpus} "
            "that torch can use; lower num_processes, or train on the CPU: --accelerate-config cpu, cpu_ddp_2 or cpu_zero2_2."
        )


def check_setup(args: Any) -> None:
    """Refuse trainer arguments whose processes or precision differ from the launch.

    Raises:
        RecipeError: The number of processes or the precision differs from the launch.
    """
    wanted, got = asked(), launched()
    if args.world_size != got.num_processes:
        raise RecipeError(
            f"launched as {got}, but transformers uses {args.world_size} process(es); take use_cpu: false out of the "
            "stage's trainer section: several processes on a CPU train together only with use_cpu: true."
        )
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    if wanted is not None and wanted.mixed_precision in ("bf16", "fp16") and wanted.mixed_precision != precision:
        raise RecipeError(
            f"{wanted.where} asks for mixed_precision {wanted.mixed_precision}, but the recipe's trainer section asks for "
            f"{'float32' if precision == 'no' else precision}; make them equal."
        )
    if got.kind == "DEEPSPEED":
        _check_deepspeed(args)


def _check_deepspeed(args: Any) -> None:
    """Refuse a DeepSpeed configuration that contradicts the trainer's arguments; transformers refuses it too late."""
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    config = HfTrainerDeepSpeedConfig(deepcopy(args.deepspeed_plugin.hf_ds_config.config))
    config.trainer_config_process(args)
    args.deepspeed_plugin.set_deepspeed_weakref()  # `HfTrainerDeepSpeedConfig` above replaced the plugin's
    if config.mismatches:
        found = "; ".join(line.removeprefix("- ds ").replace(" vs hf ", ", but ") for line in config.mismatches)
        raise RecipeError(
            f"DeepSpeed's configuration and the trainer's arguments differ: {found}; write auto in DeepSpeed's, which "
            "then takes the recipe's value."
        )


def confirm(trainer: Any) -> Setup:
    """The setup in which training begins.

    Raises:
        RecipeError: It differs from the launch.
    """
    from torch.nn.parallel import DistributedDataParallel

    got, wanted = setup_of(trainer), launched()
    alone = got.kind == "MULTI" and not isinstance(trainer.model_wrapped, DistributedDataParallel)
    if alone or not got.is_like(wanted):
        raise RecipeError(f"launched as {wanted}, but the trainer is set up as {got}; nothing was trained.")
    return got


def require_same(checkpoint: Path, saved_by: Setup, now: Setup) -> None:
    """Refuse to resume in another setup: data order, random numbers and optimizer shards belong to the first one.

    Raises:
        RecipeError: The setups differ; the message names both.
    """
    if not saved_by.is_like(now):
        before, after = str(saved_by), str(now)
        if None not in (saved_by.mixed_precision, now.mixed_precision):
            before, after = (f"{setup} in mixed_precision {setup.mixed_precision}" for setup in (saved_by, now))
        raise RecipeError(
            f"{checkpoint} was saved by {before}, and this launch is {after}. Resume with the first setup, or start again "
            "under another name (name=...) or after moving that folder away."
        )


def require_setup(checkpoint: Path, now: Setup) -> None:
    """Refuse to resume from a complete checkpoint that another setup saved, as `require_same` does."""
    require_same(checkpoint, Setup(**saved_setup(checkpoint)), now)
