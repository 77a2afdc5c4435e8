"""Changes of a recipe or its launch that make a stage fit."""

import shlex
from dataclasses import dataclass
from itertools import chain, combinations

from rlhf_recipes.launch.configs import config_files, find_config, offloads, read_config, zero_stage
from rlhf_recipes.planning.machine import Launch, Machine, launch_of, machine_of
from rlhf_recipes.planning.stage import StagePlan, plan_stage, settings_of
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.recipe.schema import Recipe, RecipeError

LORA = "{r: 16, lora_alpha: 32, target_modules: all-linear}"
NF4 = "{load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant: true}"


@dataclass(frozen=True)
class Change:
    """Words to add to `plan` or `run` of a recipe."""

    kind: str
    overrides: tuple[str, ...] = ()
    accelerate_config: str | None = None

    def __add__(self, other: "Change") -> "Change":
        config = self.accelerate_config or other.accelerate_config
        return Change(f"{self.kind}, {other.kind}", self.overrides + other.overrides, config)

    def __str__(self) -> str:
        option = ["--accelerate-config", self.accelerate_config] if self.accelerate_config else []
        return shlex.join([*option, *self.overrides])


def changes(recipe: Recipe, plan: StagePlan) -> list[Change]:
    """Single changes of a stage; those that change the result least come first."""
    stage, section = plan.stage, getattr(recipe, plan.stage)
    settings, key = settings_of(recipe, stage, plan.machine.count), f"{stage}.trainer"
    found, size = [], plan.batch.sampled // 2
    while size:
        found.append(Change("sampling", (f"{key}.sampling_batch_size={size}",)))
        size //= 2
    if not plan.batch.checkpointing:
        found.append(Change("checkpointing", (f"{key}.gradient_checkpointing=true",)))
    rows, accumulation = settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"]
    factor = 2
    while rows % factor == 0:
        keys = [f"{key}.per_device_train_batch_size={rows // factor}"]
        if section.global_batch_size is None:  # otherwise accumulation follows
            keys.append(f"{key}.gradient_accumulation_steps={accumulation * factor}")
        if settings.get("steps_per_generation"):  # keeps the size of the rollout
            keys.append(f"{key}.steps_per_generation={settings['steps_per_generation'] * factor}")
        found.append(Change("batch", tuple(keys)))
        factor *= 2
    launch, on_gpus = plan.launch, plan.machine.device != "cpu"
    if on_gpus and not launch.zero_stage and "8bit" not in plan.batch.optimizer:
        found.append(Change("optimizer", (f"{key}.optim=paged_adamw_8bit",)))
    if stage == "ppo" and section.value_model != "shared":
        found.append(Change("value model", ("ppo.value_model=shared",)))
    if on_gpus and not launch.offload:
        if launch.num_processes > 1 and not launch.zero_stage:
            found.append(Change("ZeRO", (), _zero_config(offload=False)))
        found.append(Change("ZeRO", (), _zero_config(offload=True)))
    from_scratch = stage == "sft" and section.scratch is not None
    if section.peft is None and not from_scratch:
        found.append(Change("adapter", (f"{stage}.peft={LORA}",)))
    if section.quantization is None and not from_scratch:
        peft = (f"{stage}.peft={LORA}",) if section.peft is None else ()
        found.append(Change("adapter", (*peft, f"{stage}.quantization={NF4}")))
    return [change for change in found if change.overrides or change.accelerate_config]


def _zero_config(offload: bool) -> str | None:
    """Name of a configuration of accelerate with ZeRO-2 on the GPUs of one machine; its number of processes may differ."""
    for name, path in config_files().items():
        try:
            values = read_config(path)
        except RecipeError:  # a wrong file of the user's own, which `rlhf-recipes configs` reports
            continue
        of_gpus = values["distributed_type"] == "DEEPSPEED" and not str(values.get("gpu_ids", "all")).startswith("-1")
        if of_gpus and zero_stage(values) == 2 and offloads(values) == offload and values.get("num_machines", 1) == 1:
            return name
    return None


def started(gpu: str | None, accelerate_config: str | None) -> tuple[Machine, Launch]:
    """The machine of `--gpu` and its launch; a configuration says the number of processes if `gpu` does not."""
    processes = 1
    if accelerate_config is not None:
        processes = read_config(find_config(accelerate_config)).get("num_processes", 1)
    machine = machine_of(gpu, processes)
    return machine, launch_of(machine, accelerate_config)


def smallest_change(
    name: str, overrides: list[str], plan: StagePlan, accelerate_config: str | None, gpu: str | None
) -> Change | None:
    """The first single change that makes a stage fit, or else the first pair of changes; None if no pair does.

    Args:
        name: Name or file of the recipe.
        overrides: `dotted.key=value` each, of the plan.
        plan: The plan of the stage.
        accelerate_config: Configuration of accelerate, of the plan.
        gpu: `--gpu` of the plan.
    """
    recipe = load_recipe(name, overrides)
    singles = changes(recipe, plan)

    def fits(change: Change) -> bool:
        try:
            changed = load_recipe(name, [*overrides, *change.overrides])
            machine, launch = started(gpu, change.accelerate_config or accelerate_config)
            return plan_stage(changed, plan.stage, machine, launch).fits
        except RecipeError:  # a recipe may refuse a change
            return False

    pairs = (first + second for first, second in combinations(singles, 2) if first.kind != second.kind)
    return next(filter(fits, chain(singles, pairs)), None)
