"""The machine that a stage is planned for, and the launch that uses it."""

import re
from dataclasses import dataclass

import psutil
import torch

from rlhf_recipes.launch.configs import find_config, kind, offloads, read_config, zero_stage
from rlhf_recipes.launch.setup import Setup
from rlhf_recipes.recipe.schema import RecipeError

GIB = 2**30

FLOAT32 = 4
"""Bytes of a float32 number."""

GIGABYTES = {
    "T4": 16, "V100": 16, "P100": 16, "L4": 24, "A10": 24, "A10G": 24, "A30": 24, "A40": 48, "L40": 48, "L40S": 48,
    "A100": 80, "H100": 80, "H200": 141, "H20": 96, "B200": 180, "GH200": 96, "MI300X": 192, "A6000": 48, "RTX6000": 24,
    "RTX2080TI": 11, "RTX3060": 12, "RTX3070": 8, "RTX3080": 10, "RTX3090": 24, "RTX4060": 8, "RTX4070": 12,
    "RTX4080": 16, "RTX4090": 24, "RTX5080": 16, "RTX5090": 32,
}  # fmt: skip
"""Name of a GPU -> its memory in GB; the more common size if there are two."""

RESERVED_BYTES, RESERVED_SHARE = 1 * GIB, 0.04
"""Memory of a GPU that no plan uses: CUDA's context and libraries, and memory that its allocator cannot use."""

IMPORTS = 0.7 * GIB
"""Memory of a process on the CPU before it loads a model."""


@dataclass(frozen=True)
class Launch(Setup):
    """The setup that a stage is planned for."""

    device: str = "cuda"
    offload: bool = False
    """True if DeepSpeed keeps master weights, gradients and optimizer states in the CPU's memory."""

    def __str__(self) -> str:
        return f"{super().__str__()}{', optimizer offloaded to the CPU' if self.offload else ''}"

    @property
    def half(self) -> bool:
        """True for bf16 and fp16: autocast over float32 weights, or with DeepSpeed weights in half precision."""
        return self.mixed_precision in ("bf16", "fp16")

    @property
    def autocast(self) -> bool:
        return self.half and not self.zero_stage

    @property
    def weight_bytes(self) -> int:
        return 2 if self.half and self.zero_stage else FLOAT32


@dataclass(frozen=True)
class Machine:
    """`count` GPUs, or processes on a CPU, each with this many bytes."""

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
    """The machine that `--gpu` describes.

    Args:
        text: `--gpu`. None: the GPUs of this machine, or its CPU.
        processes: Number of GPUs if the text does not say it.

    Raises:
        RecipeError: The text has another form, or names an unknown GPU without its memory.
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
        f"--gpu: {text!r} has no known memory; write NxNAME-GB, such as 8xH100-80, 1xRTX3060-12, 2x24 or cpu-16; these need "
        f"no size: {', '.join(GIGABYTES)}, cpu."
    )


def launch_of(machine: Machine, accelerate_config: str | None) -> Launch:
    """The launch that uses all of a machine.

    Args:
        machine: Each GPU gets one process.
        accelerate_config: Name or file of a configuration of accelerate. None: DDP.

    Raises:
        RecipeError: There is no such configuration, or the planner has no formulas for its kind of distribution.
    """
    values = {} if accelerate_config is None else read_config(find_config(accelerate_config))
    name = values.get("distributed_type", "NO")
    stage = zero_stage(values) if name == "DEEPSPEED" else None
    if name == "FSDP" or stage in (0, 3):
        raise RecipeError(
            f"--accelerate-config: plan has no formulas for {kind(values)} ({accelerate_config}); take one with DDP, ZeRO-1 "
            "or ZeRO-2."
        )
    precision = values.get("mixed_precision") or ("no" if machine.device == "cpu" else "bf16")
    name = "MULTI_GPU" if stage is None else name
    return Launch(machine.count, name, stage, precision, machine.device, offload=offloads(values))
