"""The setup of a run: the one that the user asked the launcher for, the launched one, and the trainer's.

The launcher's command line says two things that its environment does not: whether `mixed_precision` is an explicit `no`
or left to the hardware, and whether `gpu_ids: all` asks for GPUs that the machine does not have.
"""

import os
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from rlhf_recipes.launch.configs import zero_stage, zero_stage_of_file
from rlhf_recipes.launch.start import COMMAND

KINDS = {"NO": "no distribution", "MULTI": "DDP", "DEEPSPEED": "DeepSpeed", "FSDP": "FSDP"}
"""accelerate's `DistributedType`, without the device (MULTI_GPU, MULTI_CPU, ...) -> its name in messages."""


@dataclass(frozen=True)
class Setup:
    """How a run is spread over processes."""

    num_processes: int
    distributed_type: str
    """accelerate's name: NO, MULTI_GPU, MULTI_CPU, DEEPSPEED, FSDP, ..."""
    zero_stage: int | None = None
    """DeepSpeed's; None without DeepSpeed."""
    mixed_precision: str | None = None
    """`no`, `bf16` or `fp16`; None: not known yet."""
    device: str | None = None
    """Type, such as `cuda`; None: not known yet."""

    def __str__(self) -> str:
        processes = f"{self.num_processes} process{'es' if self.num_processes > 1 else ''}"
        if self.kind == "NO":
            return processes
        zero = f" ZeRO-{self.zero_stage}" if self.zero_stage else ""
        return f"{processes} with {KINDS.get(self.kind, self.kind)}{zero}"

    @property
    def kind(self) -> str:
        """One of `KINDS`. DDP with one process, such as a DDP configuration with `--num_processes 1`, is NO."""
        if self.distributed_type.startswith("MULTI"):
            return "MULTI" if self.num_processes > 1 else "NO"
        return self.distributed_type

    def is_like(self, other: "Setup") -> bool:
        """True if a run can resume in `other`. The device may differ; an unknown precision equals every other."""
        precisions = {self.mixed_precision, other.mixed_precision} - {None}
        mine, others = ((setup.num_processes, setup.kind, setup.zero_stage) for setup in (self, other))
        return len(precisions) < 2 and mine == others

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Asked(Setup):
    """The setup that the user asked `accelerate launch` for; settings that the user left open are those of `launched`."""

    where: str = ""
    """The configuration file, or `accelerate launch`."""
    gpu_ids: str | None = None


def launched() -> Setup:
    """The setup that this process's environment describes; the launcher wrote it."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if flag("ACCELERATE_USE_DEEPSPEED"):
        file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")  # accelerate's default
        return Setup(processes, "DEEPSPEED", zero_stage_of_file(file) if file else int(stage))
    if flag("ACCELERATE_USE_FSDP"):
        return Setup(processes, "FSDP")
    return Setup(processes, "MULTI" if processes > 1 else "NO")


def asked() -> Asked | None:
    """The request to the `accelerate launch` that started this process; None if something else started it."""
    command = _launcher_command()
    if command is None:
        return None
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    args, got = launch_command_parser().parse_args(command), launched()
    file = args.config_file or (default_config_file if os.path.isfile(default_config_file) and not args.cpu else None)
    values = load_config_from_file(file).to_dict() if file else {}
    flags = {"DEEPSPEED": args.use_deepspeed, "FSDP": args.use_fsdp, "MULTI": args.multi_gpu}
    kind = next((name for name, given in flags.items() if given), values.get("distributed_type", got.distributed_type))
    processes = args.num_processes or values.get("num_processes", -1)
    if args.deepspeed_config_file:
        values["deepspeed_config"] = {"deepspeed_config_file": args.deepspeed_config_file}
    stage = None
    if kind == "DEEPSPEED":
        stage = zero_stage(values) if args.zero_stage is None else int(args.zero_stage)
    return Asked(
        num_processes=processes if processes > 0 else got.num_processes,
        distributed_type=kind,
        zero_stage=stage,
        mixed_precision=args.mixed_precision or values.get("mixed_precision"),
        where=str(file or "accelerate launch"),
        gpu_ids=args.gpu_ids or values.get("gpu_ids"),
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


def prepare() -> None:
    """Import DeepSpeed if the launch uses it, without its compiler and its messages on the terminal."""
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # without it, DeepSpeed warns if it is installed
    if not flag("ACCELERATE_USE_DEEPSPEED"):
        return
    import deepspeed

    deepspeed.utils.logger.handlers.clear()
    deepspeed.utils.logger.propagate = True
    # In bf16, DeepSpeed prints the memory in use twice for each frozen model.
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None
    # A faster all-reduce for CPU processes, which DeepSpeed compiles at its first use; gloo replaces it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def flag(name: str) -> bool:
    """True if an environment variable is switched on, in any of accelerate's spellings."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def _launcher_command() -> list[str] | None:
    """Arguments of `launch.processes`, or of the `accelerate launch` that is this process's parent."""
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
