"""Forecasts a recipe's stages before they run: memory on a GPU, changes that make a stage fit, time."""

from collections.abc import Iterator
from dataclasses import fields
from itertools import pairwise

from rlhf_recipes.planning.changes import smallest_change, started
from rlhf_recipes.planning.machine import GIB
from rlhf_recipes.planning.memory import Estimate
from rlhf_recipes.planning.stage import StagePlan, plan_stage, settings_of
from rlhf_recipes.recipe.batch import rows_of_step
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.recipe.schema import ON_POLICY, TRAINED, Recipe, RecipeError
from rlhf_recipes.runs.files import read_manifest, read_metrics, run_path
from rlhf_recipes.system.terminal import print_table, say

LABELS = {"buffers": "DDP / ZeRO buffers", "value_model": "value network", "kv_cache": "KV cache"}
"""Field of `Estimate` -> its row in the table, if not named like the field."""


def run_plan(
    name: str, overrides: list[str], gpu: str | None, accelerate_config: str | None, throughput: float | None
) -> bool:
    """Print the plan of a recipe; return True if all of its stages fit."""
    recipe = load_recipe(name, overrides)
    machine, launch = started(gpu, accelerate_config)
    plans = [plan_stage(recipe, stage, machine, launch) for stage in TRAINED if getattr(recipe, stage) is not None]
    if not plans:
        raise RecipeError(f"recipe {recipe.name} has no stage that trains.")
    say(f"{recipe.name} on {machine}, of which {machine.reserve / GIB:.1f} GB stay free; {launch}\n")
    _print_memory(plans)
    say()
    for plan in plans:
        for line in _lines(recipe, plan, throughput):
            say(line)
        if not plan.fits:
            change = smallest_change(name, overrides, plan, accelerate_config, gpu)
            none = "no change of one or two keys makes it fit: take more memory or GPUs."
            say(f"{'':<8} {f'fits with: {change}' if change else none}")
    for note in dict.fromkeys(note for plan in plans for note in plan.notes):
        say(note)
    return all(plan.fits for plan in plans)


def _print_memory(plans: list[StagePlan]) -> None:
    columns = [(plan, name, moment) for plan in plans for name, moment in plan.moments.items()]
    rows = []
    for name in (field.name for field in fields(Estimate)):
        values = [getattr(moment, name) for _, _, moment in columns]
        if any(values):
            rows.append((LABELS.get(name, name.replace("_", " ")), *map(_gigabytes, values)))
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


def rates_of(recipe: Recipe, stage: str) -> list[float]:
    """Rows per second at every logged step of this recipe's finished run; [] without such a run."""
    path = run_path(recipe, stage)
    manifest = read_manifest(path)
    if manifest is None or manifest["status"] != "finished":
        return []
    lines = read_metrics(path)
    if stage in ON_POLICY:
        return [line["episodes_per_second"] for line in lines if line.get("episodes_per_second")]
    timed = [
        (line["step"], line["seconds"]) for line in lines if "step" in line and "seconds" in line and "loss" in line
    ]
    processes = manifest["setup"]["num_processes"]
    settings = settings_of(load_recipe(str(path / "recipe.yaml")), stage, processes)  # of the run, not of the plan
    rows = rows_of_step(settings, processes)
    return [(b[0] - a[0]) * rows / (b[1] - a[1]) for a, b in pairwise(timed) if b[1] > a[1] and b[0] > a[0]]


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
