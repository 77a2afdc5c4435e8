"""Finds and checks configurations of accelerate, `accelerate_configs/*.yaml`."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from rlhf_recipes.recipe.checks import check_keys
from rlhf_recipes.recipe.named_files import announce_hiding, find_file, read_file
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.recipe.trainer_keys import launch_fields, launch_options

KINDS = {
    "NO": "one process",
    "MULTI_GPU": "DDP",
    "DEEPSPEED": "DeepSpeed",
    "FSDP": "FSDP",
}
"""`distributed_type` -> its name in messages. Others of accelerate's types were never tried and are refused."""


def config_folders() -> list[Path]:
    """Folders of configurations, first match first: `./accelerate_configs`, then the shipped ones."""
    package = Path(__file__).parents[1]
    shipped = package if (package / "accelerate_configs").is_dir() else package.parent
    return [Path("accelerate_configs"), shipped / "accelerate_configs"]


def config_files() -> dict[str, Path]:
    """Name -> file of every configuration."""
    files: dict[str, Path] = {}
    for folder in reversed(config_folders()):
        files |= {path.stem: path for path in folder.glob("*.yaml")}
    return dict(sorted(files.items()))


def find_config(name: str) -> Path:
    """The file of a configuration, from its name or path.

    Raises:
        RecipeError: There is no such file.
    """
    found = find_file(name, config_files(), "accelerate configuration", "configs", "--accelerate-config ")
    if name in config_files():
        announce_hiding(found, config_folders()[-1])
    return found


def read_config(path: Path) -> dict[str, Any]:
    """The keys of a configuration, read as accelerate reads them.

    Raises:
        RecipeError: Every reason why accelerate would refuse the file, or silently start something else.
    """
    values = read_file(path, yaml.SafeLoader)  # YAML 1.1, in which a bare `no` is false
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a configuration is a mapping of keys to values, not {type(values).__name__}.")
    findings = _findings(values)
    if findings:
        raise RecipeError("\n".join(f"{path}: {finding}" for finding in findings))
    return values


def _findings(values: dict[str, Any]) -> list[str]:
    findings = check_keys(values, "accelerate's configurations", launch_fields())
    if values.get("mixed_precision") is False:
        findings = ["mixed_precision is False; write 'no' in quotes: YAML reads a bare no as false."]
    if findings:
        return findings
    kind = values.get("distributed_type")
    if kind == "MULTI_CPU" or (kind == "MULTI_GPU" and values.get("use_cpu")):
        key = "distributed_type: MULTI_CPU" if kind == "MULTI_CPU" else "use_cpu: true"
        findings.append(f"{key} would start one process; for several on the CPU see cpu_ddp_2 and cpu_zero2_2.")
    elif kind == "DEEPSPEED" and values.get("use_cpu"):
        findings.append("use_cpu: true would start plain DDP instead of DeepSpeed; see cpu_zero2_2.")
    elif str(kind) not in KINDS:
        findings.append(f"distributed_type is {kind!r}; set one of {', '.join(KINDS)} ('NO' in quotes).")
    elif kind != "NO" and values.get("num_processes", 0) < 1:
        findings.append("num_processes: set it to the number of processes, at least 1.")
    # accelerate ignores keys that it does not know in these two sections.
    for section, prefix in (("deepspeed_config", ""), ("fsdp_config", "fsdp_")):
        names = {f"{prefix}{str(key).removeprefix(prefix)}": None for key in values.get(section) or {}}
        findings += check_keys(
            names, "accelerate's configurations", dict.fromkeys(launch_options(), Any), f"{section}."
        )
    stage = (values.get("deepspeed_config") or {}).get("zero_stage", 2)
    if str(stage) not in ("0", "1", "2", "3"):
        findings.append(f"deepspeed_config.zero_stage is {stage!r}; set 0, 1, 2 or 3.")
    elif not findings:
        zero_stage(values)  # raises if DeepSpeed's own file cannot be read
    return findings


def launchable(name: str) -> Path:
    """The file of a configuration, from its name or path, if this machine can start stages with it.

    Raises:
        RecipeError: There is no such file, its content is wrong, it is for several machines, or it needs DeepSpeed, which is
            not installed.
    """
    path = find_config(name)
    values = read_config(path)
    if values["distributed_type"] == "DEEPSPEED" and find_spec("deepspeed") is None:
        raise RecipeError(f"{path}: it needs DeepSpeed, which is not installed: pip install 'rlhf-recipes[deepspeed]'.")
    if values.get("num_machines", 1) > 1:
        raise RecipeError(
            f"{path}: it is for {values['num_machines']} machines, and each needs its number: run accelerate "
            f"launch --config_file {path} --machine_rank ... on each of them, as docs/scaling.md shows."
        )
    return path


def kind(values: dict[str, Any]) -> str:
    """Name of the way in which a configuration spreads training over processes."""
    if values["distributed_type"] != "DEEPSPEED":
        return KINDS[values["distributed_type"]]
    return f"DeepSpeed ZeRO-{zero_stage(values)}"


def zero_stage(values: dict[str, Any]) -> int:
    """The ZeRO stage of a configuration with DeepSpeed; accelerate's default is 2."""
    section = values.get("deepspeed_config") or {}
    if "deepspeed_config_file" not in section:
        return int(section.get("zero_stage", 2))
    return zero_stage_of_file(section["deepspeed_config_file"])


def offloads(values: dict[str, Any]) -> bool:
    """True if a configuration keeps the optimizer in the CPU's memory."""
    section = values.get("deepspeed_config") or {}
    if "deepspeed_config_file" not in section:
        return section.get("offload_optimizer_device", "none") != "none"
    zero = _of_deepspeed(section["deepspeed_config_file"]).get("zero_optimization") or {}
    return (zero.get("offload_optimizer") or {}).get("device", "none") != "none"


def zero_stage_of_file(given: str) -> int:
    """The ZeRO stage in DeepSpeed's own configuration.

    Args:
        given: Path of the file, or its text.

    Raises:
        RecipeError: The configuration cannot be read.
    """
    return (_of_deepspeed(given).get("zero_optimization") or {}).get("stage", 0)


def _of_deepspeed(given: str) -> dict[str, Any]:
    inline = str(given).lstrip().startswith("{")
    try:
        values = json.loads(given if inline else Path(given).read_text(encoding="utf-8"))
    except (OSError, TypeError, ValueError) as error:
        shown = "its text" if inline else given
        why = "no such file" if isinstance(error, FileNotFoundError) else f"not DeepSpeed's JSON: {error}"
        raise RecipeError(f"deepspeed_config_file: {shown}: {why}.") from error
    if not isinstance(values, dict):
        raise RecipeError(f"deepspeed_config_file: {given}: it must contain keys and values, not {values!r}.")
    return values


def purpose(path: Path) -> str:
    """The purpose of a configuration, from the first line of its file: `# NAME: ...`; empty without such a line."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix(f"# {path.stem}: ") if first.startswith(f"# {path.stem}: ") else ""
