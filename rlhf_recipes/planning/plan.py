"""Forecasts a recipe's stages before they run: memory on a GPU, changes that make a stage fit, time."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from rlhf_recipes.launch.configs import config_files, find_config, offloads, read_config, zero_stage
from rlhf_recipes.planning.architectures import PLANNED
from rlhf_recipes.planning.machine import GIB, Launch, Machine, launch_of, machine_of
from rlhf_recipes.planning.stage import StagePlan, plan_stage, settings_of
from rlhf_recipes.recipe.batch import rows_of_step
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.recipe.schema import Recipe, RecipeError
from rlhf_recipes.runs.files import is_finished, read_manifest, read_metrics, run_path
from rlhf_recipes.system.terminal import print_table, say


def rates_of(recipe: Recipe, stage: str) -> list[float]:
    """Rows a second at every logged step of this recipe's finished run; empty: there is none here."""
    path = run_path(recipe, stage)
    if not is_finished(path):
        return []
    lines = read_metrics(path)
    if stage in ("ppo", "rloo"):
        return [line["episodes_per_second"] for line in lines if line.get("episodes_per_second")]
    timed = [
        (line["step"], line["seconds"]) for line in lines if "step" in line and "seconds" in line and "loss" in line
    ]
    processes = read_manifest(path)["setup"]["num_processes"]
    settings = settings_of(load_recipe(str(path / "recipe.yaml")), stage, processes)  # as it ran, not as it is planned
    rows = rows_of_step(settings, processes)
    return [(b[0] - a[0]) * rows / (b[1] - a[1]) for a, b in pairwise(timed) if b[1] > a[1] and b[0] > a[0]]


# What makes it fit

LORA = "{r: 16, lora_alpha: 32, target_modules: all-linear}"
NF4 = "{load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant: true}"


@dataclass(frozen=True)
class Change:
    """Something to type behind `plan` or `run` of a recipe."""

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
    """Single changes of a stage, those first that change least of what is learned."""
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
        if section.global_batch_size is None:  # else accumulation follows
            keys.append(f"{key}.gradient_accumulation_steps={accumulation * factor}")
        if settings.get("steps_per_generation"):  # or a rollout would get smaller too
            keys.append(f"{key}.steps_per_generation={settings['steps_per_generation'] * factor}")
        found.append(Change("batch", tuple(keys)))
        factor *= 2
    launch = plan.launch
    if launch.zero_stage == 0 and plan.machine.device != "cpu" and "8bit" not in plan.batch.optimizer:
        found.append(Change("optimizer", (f"{key}.optim=paged_adamw_8bit",)))
    if stage == "ppo" and section.value_model != "shared":
        found.append(Change("value model", ("ppo.value_model=shared",)))
    if launch.zero_stage == 0 and plan.machine.device != "cpu":
        if launch.processes > 1:
            found.append(Change("ZeRO", (), _zero_config(False)))
        found.append(Change("ZeRO", (), _zero_config(True)))
    elif not launch.offload and plan.machine.device != "cpu":
        found.append(Change("ZeRO", (), _zero_config(True)))
    from_scratch = stage == "sft" and section.scratch is not None
    if section.peft is None and not from_scratch:
        found.append(Change("adapter", (f"{stage}.peft={LORA}",)))
    if section.quantization is None and not from_scratch:
        keys = (f"{stage}.quantization={NF4}",)
        found.append(Change("adapter", keys if section.peft is not None else (f"{stage}.peft={LORA}", *keys)))
    return [change for change in found if change.overrides or change.accelerate_config]


def _zero_config(offload: bool) -> str | None:
    """Name of a file of accelerate's with ZeRO-2, whatever its number of processes."""
    for name, path in config_files().items():
        try:
            values = read_config(path)
        except RecipeError:  # a file of the user's own, of which `rlhf-recipes configs` says what is wrong
            continue
        of_gpus = values["distributed_type"] == "DEEPSPEED" and not str(values.get("gpu_ids", "all")).startswith("-1")
        if of_gpus and zero_stage(values) == 2 and offloads(values) == offload and values.get("num_machines", 1) == 1:
            return name
    return None


def smallest_change(
    name: str, overrides: list[str], plan: StagePlan, accelerate_config: str | None, gpu: str | None
) -> Change | None:
    """The first single change, or else the first pair, with which a stage fits; None: there is none.

    Args:
        name: Of the recipe.
        overrides: `dotted.key=value` each, with which it was planned.
        plan: Of the stage.
        accelerate_config: With which it was planned.
        gpu: `--gpu`: without a number, a configuration's number of processes counts.
    """
    recipe = load_recipe(name, overrides)
    singles = changes(recipe, plan)

    def fits(change: Change) -> bool:
        try:
            changed = load_recipe(name, [*overrides, *change.overrides])
            machine, launch = _started(gpu, change.accelerate_config or accelerate_config)
            return plan_stage(changed, plan.stage, machine, launch).fits
        except RecipeError:  # not every change goes with every recipe
            return False

    for change in singles:
        if fits(change):
            return change
    for i, first in enumerate(singles):
        for second in singles[i + 1 :]:
            if first.kind != second.kind and fits(first + second):
                return first + second
    return None


# Output

ITEMS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "buffers": "DDP / ZeRO buffers",
    "reference": "reference",
    "value_model": "value network",
    "reward_models": "reward models",
    "rollout": "rollout",
    "activations": "activations",
    "logits": "logits",
    "kv_cache": "KV cache",
}
"""Fields of `Estimate` -> their row in the table."""


def run_plan(
    name: str, overrides: list[str], gpu: str | None, accelerate_config: str | None, throughput: float | None
) -> bool:
    """Print the plan of a recipe; whether all of its stages fit."""
    recipe = load_recipe(name, overrides)
    machine, launch = _started(gpu, accelerate_config)
    plans = [plan_stage(recipe, stage, machine, launch) for stage in PLANNED if getattr(recipe, stage) is not None]
    if not plans:
        raise RecipeError(f"recipe {recipe.name} has no stage that trains.")
    say(f"{recipe.name} on {machine}, {machine.reserve / GIB:.1f} GB of it left alone; {_described(launch)}\n")
    _print_memory(plans)
    say()
    for plan in plans:
        for line in _lines(recipe, plan, throughput):
            say(line)
        if not plan.fits:
            change = smallest_change(name, overrides, plan, accelerate_config, gpu)
            fix = (
                f"fits with: {change}"
                if change
                else "no change of one or two keys makes it fit: take more memory or GPUs."
            )
            say(f"{'':<8} {fix}")
    for note in dict.fromkeys(note for plan in plans for note in plan.notes):
        say(note)
    return all(plan.fits for plan in plans)


def _started(gpu: str | None, accelerate_config: str | None) -> tuple[Machine, Launch]:
    processes = 1
    if accelerate_config is not None:
        processes = read_config(find_config(accelerate_config)).get("num_processes", 1)
    machine = machine_of(gpu, processes)
    return machine, launch_of(machine, accelerate_config)


def _described(launch: Launch) -> str:
    kind = f"ZeRO-{launch.zero_stage}" if launch.zero_stage else "DDP" if launch.processes > 1 else "one process"
    return f"{kind}{', optimizer offloaded to the CPU' if launch.offload else ''}"


def _print_memory(plans: list[StagePlan]) -> None:
    columns = [(plan, name, moment) for plan in plans for name, moment in plan.moments.items()]
    rows = []
    for field, label in ITEMS.items():
        values = [getattr(moment, field) for _, _, moment in columns]
        if any(values):
            rows.append((label, *(_gigabytes(value) for value in values)))
    rows.append(("sum", *(_gigabytes(moment.total) for _, _, moment in columns)))
    room = [plan.machine.bytes - plan.machine.reserve for plan, _, _ in columns]
    rows.append(("headroom", *(_gigabytes(r - c[2].total, True) for r, c in zip(room, columns, strict=True))))
    head = "GB on each"
    print_table([head, *(f"{plan.stage}\n{name}" for plan, name, _ in columns)], rows, left=[head])


def _gigabytes(value: float, signed: bool = False) -> str:
    if value == 0 and not signed:
        return ""
    return f"{value / GIB:.2f}" if abs(value) < 10 * GIB else f"{value / GIB:.1f}"


def _lines(recipe: Recipe, plan: StagePlan, throughput: float | None) -> Iterator[str]:
    flag = "on" if plan.batch.checkpointing else "off"
    verdict = "fits" if plan.fits else "does not fit"
    yield (
        f"{plan.stage:<8} {verdict}: {plan.total / GIB:.2f} GB, headroom {plan.headroom / GIB:.2f} GB; "
        f"gradient checkpointing {flag} ({'without' if plan.batch.checkpointing else 'with'}: {plan.otherwise / GIB:.2f} GB)"
    )
    if plan.fits_without:
        yield f"{'':<8} it fits without gradient checkpointing, and is faster: {plan.stage}.trainer.gradient_checkpointing=false"
    work, unit = plan.work, {"sft": "texts", "reward": "pairs"}.get(plan.stage, "episodes")
    if work.rows is None:
        yield f"{'':<8} as many steps as the data has rows"
    else:
        most = "at most " if work.at_most else ""
        yield f"{'':<8} {most}{work.steps:,} steps, {most}{work.rows:,} {unit}, at most {work.tokens:,} tokens"
    rates, source = ([throughput], "--throughput") if throughput else (rates_of(recipe, plan.stage), "the run here")
    if rates and work.rows is not None:
        shortest, longest = work.rows / max(rates), work.rows / min(rates)
        times = _time(shortest) if len(rates) == 1 else f"{_time(shortest)} to {_time(longest)}"
        yield f"{'':<8} {times}, by {source} ({min(rates):.3g} to {max(rates):.3g} {unit}/s)"


def _time(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
