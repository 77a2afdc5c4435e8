"""The machine that a stage is planned for, and how the stage is started on it."""

import re
from dataclasses import dataclass, replace

import psutil
import torch

from rlhf_recipes.launch.configs import find_config, kind, offloads, read_config, zero_stage
from rlhf_recipes.recipe.schema import RecipeError

GIB = 2**30

FLOAT32 = 4
"""Bytes of a number."""

GIGABYTES = {
    "T4": 16, "V100": 16, "P100": 16, "L4": 24, "A10": 24, "A10G": 24, "A30": 24, "A40": 48, "L40": 48, "L40S": 48,
    "A100": 80, "H100": 80, "H200": 141, "H20": 96, "B200": 180, "GH200": 96, "MI300X": 192, "A6000": 48, "RTX6000": 24,
    "RTX2080TI": 11, "RTX3060": 12, "RTX3070": 8, "RTX3080": 10, "RTX3090": 24, "RTX4060": 8, "RTX4070": 12,
    "RTX4080": 16, "RTX4090": 24, "RTX5080": 16, "RTX5090": 32,
}  # fmt: skip
"""Memory of GPUs that are known by name; of those that come in two sizes the commoner one."""

RESERVED_BYTES, RESERVED_SHARE = 1 * GIB, 0.04
"""Of a GPU, what is left alone: CUDA's context and libraries, and memory that its allocator cannot use."""

IMPORTS = 0.7 * GIB
"""Of a CPU's memory, what a process takes before there is a model."""


@dataclass(frozen=True)
class Launch:
    """How a stage is started."""

    processes: int = 1
    zero_stage: int = 0
    offload: bool = False
    """Whether DeepSpeed keeps master weights, gradients and optimizer states in the CPU's memory."""
    half: bool = False
    """bf16 or fp16: autocast over float32 weights; under DeepSpeed the weights themselves."""
    device: str = "cuda"

    @property
    def autocast(self) -> bool:
        return self.half and self.zero_stage == 0

    @property
    def weight_bytes(self) -> int:
        return 2 if self.half and self.zero_stage else FLOAT32


@dataclass(frozen=True)
class Machine:
    """`count` GPUs, or processes on a CPU, and the bytes that each of them has."""

    count: int
    name: str
    bytes: float

    @property
    def device(self) -> str:
        return "cpu" if self.name == "cpu" else "cuda"

    @property
    def reserve(self) -> float:
        return IMPORTS if self.device == "cpu" else RESERVED_BYTES + RESERVED_SHARE * self.bytes

    def __str__(self) -> str:
        return f"{self.count} x {self.name}, {self.bytes / GIB:.0f} GB each"


def machine_of(text: str | None, processes: int = 1) -> Machine:
    """Reads `--gpu`; None means the GPU of this machine.

    Args:
        text: `--gpu`.
        processes: How many, where the text does not say it.

    Raises:
        RecipeError: It cannot be read, or names a GPU whose memory is not known.
    """
    if text is None and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Machine(torch.cuda.device_count(), properties.name, properties.total_memory)
    number = r"(\d+(?:\.\d+)?)"
    match = re.fullmatch(
        rf"(?:(\d+)x)?(?:([A-Za-z][\w ]*)(?:-{number})?|{number})", "cpu" if text is None else text, re.IGNORECASE
    )
    if match is not None and int(match[1] or 1) > 0:
        count, name, size = int(match[1] or processes), match[2] or "GPU", match[3] or match[4]
        known = {name.upper(): gigabytes for name, gigabytes in GIGABYTES.items()}
        if name.lower() == "cpu":
            return Machine(count, "cpu", float(size) * GIB if size else psutil.virtual_memory().total / count)
        size = size or known.get(name.replace(" ", "").upper())
        if size is not None and float(size) > 0:
            return Machine(count, name, float(size) * GIB)
    raise RecipeError(
        f"--gpu: {text!r} names no GPU of known memory; write NxNAME-GB, such as 8xH100-80, 1xRTX3060-12, 2x24 or cpu-16; "
        f"by name alone: {', '.join(GIGABYTES)}, cpu."
    )


def launch_of(machine: Machine, accelerate_config: str | None) -> Launch:
    """How a stage is started on all of a machine: one process each, DDP unless a configuration of accelerate says otherwise.

    Args:
        machine: Where it runs.
        accelerate_config: Name or file of the configuration.

    Raises:
        RecipeError: There is none, or there are no numbers for its kind of distribution.
    """
    values = {"distributed_type": "NO"} if accelerate_config is None else read_config(find_config(accelerate_config))
    precision = values.get("mixed_precision")
    half = machine.device != "cpu" if precision is None else precision in ("bf16", "fp16")
    launch = Launch(processes=machine.count, half=half, device=machine.device)
    if values["distributed_type"] in ("NO", "MULTI_GPU"):
        return launch
    stage = zero_stage(values) if values["distributed_type"] == "DEEPSPEED" else None
    if stage not in (1, 2):
        raise RecipeError(
            f"--accelerate-config: {accelerate_config} is {kind(values)}, which plan has no numbers for; take one with DDP, ZeRO-1 or ZeRO-2."
        )
    return replace(launch, zero_stage=stage, offload=offloads(values))
