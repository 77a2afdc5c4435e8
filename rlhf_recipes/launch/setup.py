"""Checks that the launch has the processes and strategy that the user asked for.

Several launches silently give something else: `distributed_type: MULTI_CPU` gives one process, `use_cpu: true` with
DeepSpeed gives plain DDP, FSDP on a CPU gives plain DDP or a crash. A stage refuses to train in any of them.

The launcher's command line says two things that its environment does not: whether `mixed_precision` is an explicit `no`
or left to the hardware, and whether `gpu_ids: all` asks for GPUs that the machine does not have.
"""

import os
import shlex
from copy import deepcopy
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from rlhf_recipes.launch.configs import zero_stage, zero_stage_of_file
from rlhf_recipes.launch.start import COMMAND
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.system.files import saved_setup

KINDS = {"NO": "no distribution", "MULTI": "DDP", "DEEPSPEED": "DeepSpeed", "FSDP": "FSDP"}
"""accelerate's `DistributedType`, without the device (MULTI_GPU, MULTI_CPU, ...) -> its name in messages."""


@dataclass(frozen=True)
class Setup:
    """How a run is spread over processes."""

    num_processes: int
    distributed_type: str
    """accelerate's name: NO, MULTI_GPU, MULTI_CPU, DEEPSPEED, FSDP, ..."""
    zero_stage: int | None = None
    """Of DeepSpeed."""
    mixed_precision: str | None = None
    """`no`, `bf16` or `fp16`; None: not known yet."""
    device: str | None = None
    """Type, such as `cuda`; None: not known yet."""

    def __str__(self) -> str:
        processes = f"{self.num_processes} process{'es' if self.num_processes > 1 else ''}"
        if self.kind == "NO":
            return processes
        return f"{processes} with {KINDS[self.kind]}" + (f" ZeRO-{self.zero_stage}" if self.zero_stage else "")

    @property
    def kind(self) -> str:
        """One of `KINDS`; NO for DDP with one process, which `--num_processes 1` makes of a DDP configuration."""
        if self.distributed_type.startswith("MULTI"):
            return "MULTI" if self.num_processes > 1 else "NO"
        return self.distributed_type

    def is_like(self, other: "Setup") -> bool:
        """True if a run can resume in `other`. The device may differ; an unknown precision equals every other."""
        known = (self.mixed_precision, other.mixed_precision)
        same = None in known or known[0] == known[1]
        ours, others = ((setup.num_processes, setup.kind, setup.zero_stage) for setup in (self, other))
        return same and ours == others

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Asked:
    """The request to `accelerate launch`, from its command line or its configuration; None where neither says it."""

    where: str
    """The configuration file, or `accelerate launch`."""
    num_processes: int | None
    kind: str | None
    zero_stage: int | None
    mixed_precision: str | None
    gpu_ids: str | None


def launched() -> Setup:
    """The setup that this process's environment describes; the launcher wrote it."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if _flag("ACCELERATE_USE_DEEPSPEED"):
        return Setup(processes, "DEEPSPEED", _zero_stage_of_environment())
    if _flag("ACCELERATE_USE_FSDP"):
        return Setup(processes, "FSDP")
    return Setup(processes, "MULTI" if processes > 1 else "NO")


def asked() -> Asked | None:
    """The request to the `accelerate launch` that started this process; None if something else started it."""
    command = _launcher_command()
    if command is None:
        return None
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    args = launch_command_parser().parse_args(command)
    file = args.config_file or (default_config_file if os.path.isfile(default_config_file) and not args.cpu else None)
    config = load_config_from_file(args.config_file) if file else None
    flags = {"DEEPSPEED": args.use_deepspeed, "FSDP": args.use_fsdp, "MULTI": args.multi_gpu}
    kind = next((name for name, given in flags.items() if given), None)
    stage = args.zero_stage
    if config is not None:
        name = str(getattr(config.distributed_type, "value", config.distributed_type))
        kind = kind or ("MULTI" if name.startswith("MULTI") else name)
        own = {"deepspeed_config_file": args.deepspeed_config_file} if args.deepspeed_config_file else {}
        stage = zero_stage({"deepspeed_config": own or config.deepspeed_config}) if stage is None else stage
    processes = args.num_processes or (config.num_processes if config is not None else -1)
    return Asked(
        where=str(file or "accelerate launch"),
        num_processes=processes if processes > 0 else None,
        kind=kind,
        zero_stage=int(stage) if kind == "DEEPSPEED" and stage is not None else None,
        mixed_precision=args.mixed_precision or (config.mixed_precision if config is not None else None),
        gpu_ids=args.gpu_ids or (config.gpu_ids if config is not None else None),
    )


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
    if got.kind == "DEEPSPEED" and _flag("ACCELERATE_USE_CPU"):
        raise RecipeError(
            "use_cpu: true (or ACCELERATE_USE_CPU) with DeepSpeed gives plain DDP; write use_cpu: false, as "
            "accelerate_configs/cpu_zero2_2.yaml does: without a GPU, the processes run on the CPU all the same."
        )
    if wanted is not None:
        _require_asked(wanted, got)
    _require_gpus(wanted, given)


def _require_asked(wanted: Asked, got: Setup) -> None:
    processes = wanted.num_processes or got.num_processes
    kind = wanted.kind if processes > 1 or wanted.kind != "MULTI" else None
    if processes != got.num_processes or (kind is not None and kind != got.kind):
        raise RecipeError(
            f"{wanted.where}: {processes} process(es){f' with {KINDS.get(kind, kind)}' if kind else ''} asked for, but this "
            f"launch gives {got}. `use_cpu: true`, `--cpu` and MULTI_CPU start one process; for several on a CPU write "
            "distributed_type MULTI_GPU (or DEEPSPEED) and use_cpu: false, as accelerate_configs/cpu_ddp_2.yaml does."
        )
    if wanted.zero_stage is not None and wanted.zero_stage != got.zero_stage:
        raise RecipeError(f"{wanted.where}: ZeRO stage {wanted.zero_stage} asked for, but this launch gives {got}.")


def _require_gpus(wanted: Asked | None, given: dict[str, Any]) -> None:
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    asks_for_gpus = wanted is not None and bool(wanted.gpu_ids) and not wanted.gpu_ids.startswith("-1")
    if given.get("use_cpu") or (here == 1 and not asks_for_gpus):
        return
    import torch

    gpus = torch.accelerator.device_count()
    if gpus >= here or (gpus == 0 and not asks_for_gpus and here <= (os.cpu_count() or 1)):
        return  # several processes on a CPU need no configuration that says so, unless they are too many
    hidden = wanted is not None and (wanted.gpu_ids or "").startswith("-1")
    if not hidden:
        where = f"{wanted.where}: " if wanted is not None else ""
        raise RecipeError(
            f"{where}{here} process(es) on this machine's GPUs asked for, and it has {gpus} that torch can use; lower "
            "num_processes, or train on the CPU: --accelerate-config cpu, cpu_ddp_2 or cpu_zero2_2."
        )


def check_setup(args: Any) -> None:
    """Refuse trainer arguments whose processes or precision differ from the launch.

    Raises:
        RecipeError: The number of processes or the precision differs from the launch.
    """
    wanted, got = asked(), launched()
    if args.world_size != got.num_processes:
        raise RecipeError(
            f"launched as {got}, but transformers makes {args.world_size} process(es) of it; take use_cpu: false out of the "
            "stage's trainer section: several processes on a CPU are one run only with use_cpu: true."
        )
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    if wanted is not None and wanted.mixed_precision in ("bf16", "fp16") and wanted.mixed_precision != precision:
        raise RecipeError(
            f"{wanted.where} asks for mixed_precision {wanted.mixed_precision}, the recipe's trainer section for "
            f"{'float32' if precision == 'no' else precision}: make the two say the same."
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
            f"DeepSpeed's configuration and the trainer's arguments differ: {found}; write auto in DeepSpeed's, so that "
            "the recipe counts."
        )


def setup_of(trainer: Any) -> Setup:
    """The setup of a trainer; once training has begun, DeepSpeed's engine says the ZeRO stage."""
    accelerator = trainer.accelerator
    name = str(accelerator.distributed_type.value)
    stage = None
    if name == "DEEPSPEED":
        engine = trainer.model_wrapped
        plugin = accelerator.state.deepspeed_plugin
        stage = engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else plugin.zero_stage
    return Setup(accelerator.num_processes, name, stage, accelerator.mixed_precision, accelerator.device.type)


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
    """Refuse to resume in another setup: data order, random numbers and optimizer shards belong to the old one.

    Raises:
        RecipeError: The setups differ; the message has both.
    """
    if not saved_by.is_like(now):
        before, after = str(saved_by), str(now)
        if None not in (saved_by.mixed_precision, now.mixed_precision):
            before, after = (f"{setup} in mixed_precision {setup.mixed_precision}" for setup in (saved_by, now))
        raise RecipeError(
            f"{checkpoint} was saved by {before}, and this launch is {after}. Go on as it was saved, or start anew: under "
            "another name (name=...), or after moving that folder away."
        )


def require_setup(checkpoint: Path, now: Setup) -> None:
    """Refuse to resume from a complete checkpoint that another setup saved, as `require_same` does."""
    require_same(checkpoint, Setup(**saved_setup(checkpoint)), now)


def prepare() -> None:
    """Import DeepSpeed if the launch uses it, so that it needs no compiler and stays off the terminal."""
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it warns, wherever it is installed
    if not _flag("ACCELERATE_USE_DEEPSPEED"):
        return
    import deepspeed

    deepspeed.utils.logger.handlers.clear()
    deepspeed.utils.logger.propagate = True
    # In bf16 it prints the memory in use, twice for each frozen model.
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None
    # A faster all-reduce for one machine's CPU processes, compiled when it is first used; gloo does it too.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def _zero_stage_of_environment() -> int:
    if file := os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        return zero_stage_of_file(file)
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))  # accelerate's default


def _launcher_command() -> list[str] | None:
    """Arguments of the `accelerate launch` that is this process's parent, or of our own launcher."""
    if command := os.environ.get(COMMAND):
        return shlex.split(command)
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return None
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return None
    for i, word in enumerate(words):
        if word == "accelerate.commands.launch" or Path(word).name == "accelerate-launch":
            return words[i + 1 :]
        names = ("accelerate", "accelerate_cli.py", "accelerate.commands.accelerate_cli")
        if Path(word).name in names and words[i + 1 : i + 2] == ["launch"]:
            return words[i + 2 :]
    return None
