"""Many runs of one recipe, one after another: every combination of some keys' values, with several seeds.

    rlhf-recipes sweep imdb_tiny --stage rloo rloo.trainer.num_generations=2,4 --seeds 3

A run has its own folder with its recipe, its stage and its eval. All sweeps of a recipe share the stages that runs
start from (`stage:sft` in a recipe): the same settings are trained once.

    <runs_dir>/<recipe>/sweep-rloo.num_generations/rloo-num_generations_2-seed_42/{recipe.yaml,rloo/,eval/}
    <runs_dir>/<recipe>/sweep-rloo.num_generations/{sweep.csv,sweep.json,sweep.png}
    <runs_dir>/<recipe>/sweep-shared/sft-seed_42-<hash of its settings>/{recipe.yaml,sft/}
"""

import csv
import io
import itertools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rlhf_recipes.experiments.grid import in_path, labels, parse_grid, parse_seeds, path_parts, without_trainer
from rlhf_recipes.experiments.jobs import Cell, Job, Planner, only_stage, refuse_other_settings, run_jobs
from rlhf_recipes.pages.plots import draw_sweep
from rlhf_recipes.pages.tables import print_sweep
from rlhf_recipes.recipe.graph import input_stages, sections_of
from rlhf_recipes.recipe.schema import ON_POLICY, TRAINED, Recipe, RecipeError
from rlhf_recipes.runs.files import read_manifest, read_metrics
from rlhf_recipes.stage import load_checked
from rlhf_recipes.system.files import read_json, write_whole, writing
from rlhf_recipes.system.terminal import complain, say


@dataclass
class Row:
    """One setting of one stage, with all of its seeds."""

    stage: str
    settings: dict[str, str]
    cells: list[Cell] = field(default_factory=list)

    @property
    def label(self) -> str:
        return " ".join([self.stage, *(f"{key}={value}" for key, value in self.settings.items())])


@dataclass
class Sweep:
    """The jobs of a sweep, and the rows of its table.

    Attributes:
        folder: Folder of its runs, table and plot.
        jobs: Its jobs, in an order in which they can run.
    """

    recipe: str
    folder: Path
    seeds: list[int]
    jobs: list[Job]
    rows: list[Row]


def plan_sweep(
    name: str, overrides: list[str], stages: list[str], seeds: str, with_eval: bool = True, overwrite: bool = False
) -> Sweep:
    """Checks every run of a sweep before the first one starts.

    Args:
        name: Name of a recipe, or path of a YAML file.
        overrides: See `parse_grid`.
        stages: Stages to sweep; empty: the recipe's algorithms.
        seeds: See `parse_seeds`.
        with_eval: True: an eval measures each trained policy.
        overwrite: True: runs with other settings are moved aside.

    Raises:
        RecipeError: Every finding about every run.
    """
    axes, plain = parse_grid(overrides)
    recipes: dict[tuple[str, ...], Recipe] = {}
    findings: list[str] = []
    for values in itertools.product(*(axis.values for axis in axes)):
        swept = [f"{key}={value}" for axis, value in zip(axes, values, strict=True) for key in axis.keys]
        try:
            recipes[values] = load_checked(name, [*plain, *swept])
        except RecipeError as error:
            findings += [line for line in str(error).splitlines() if line not in findings]
    if findings:
        raise RecipeError("\n".join(findings))
    first = next(iter(recipes.values()))
    chosen = _chosen_stages(first, stages)
    numbers = parse_seeds(seeds, first.seed)
    used = {
        stage: set().union(*(_sections(recipe, stage, with_eval) for recipe in recipes.values())) for stage in chosen
    }
    for axis in axes:
        if not any(axis.is_in(used[stage]) for stage in chosen):
            findings.append(f"{','.join(axis.keys)}: several values, but {' and '.join(chosen)} do not depend on it.")
    if findings:
        raise RecipeError("\n".join(findings))
    keys = sorted("_".join(without_trainer(key) for key in axis.keys) for axis in axes)
    root = Path(first.runs_dir) / first.name
    folder = root / "-".join(["sweep", *map(in_path, keys or ["seeds"])])
    planner = Planner(root / "sweep-shared")
    rows: dict[str, Row] = {}
    for seed in numbers:
        for stage in chosen:
            shown = labels([axis for axis in axes if axis.is_in(used[stage])], used[stage])
            done = set()
            for values, recipe in recipes.items():
                of_axis = dict(zip(axes, values, strict=True))
                settings = {label: of_axis[axis] for axis, label in shown.items()}
                row = Row(stage, settings)
                if row.label in done:  # a run with the same values of all keys that this stage uses
                    continue
                done.add(row.label)
                place = {"runs_dir": str(folder), "name": "-".join([stage, *path_parts(settings), f"seed_{seed}"])}
                seeded = recipe.model_copy(update={"seed": seed})
                cell = planner.cell(seeded, stage, place, row.label, with_eval)
                rows.setdefault(row.label, row).cells.append(cell)
    refuse_other_settings(first.name, planner.jobs, overwrite)
    return Sweep(first.name, folder, numbers, planner.jobs, list(rows.values()))


def run_sweep(sweep: Sweep, overwrite: bool = False, config: Path | None = None) -> int:
    """Runs the unfinished jobs, then writes and prints table and plot.

    Args:
        sweep: From `plan_sweep`.
        overwrite: True: runs with other settings are moved aside.
        config: See `launch_stage`.

    Returns:
        Exit code: 0; 1 if a run failed; or the exit code of a stopped stage.
    """
    os.environ.setdefault("WANDB_RUN_GROUP", f"{sweep.recipe} {sweep.folder.name}")
    failed: dict[Job, str] = {}
    code = run_jobs("sweep", sweep.jobs, failed, sweep.folder, overwrite, config)
    if code != 0:
        return code
    _report(sweep, failed)
    return 1 if failed else 0


def _report(sweep: Sweep, failed: dict[Job, str]) -> None:
    rows = [_measured(row, failed) for row in sweep.rows]
    curves = {}
    for row in sweep.rows:
        runs = [read_metrics(cell.training.path) for cell in row.cells if cell.training not in failed]
        if runs:
            curves[row.label] = runs
    with writing("table and plot", sweep.folder / "sweep.json"):
        sweep.folder.mkdir(parents=True, exist_ok=True)
        result = {"recipe": sweep.recipe, "seeds": sweep.seeds, "rows": rows}
        write_whole(sweep.folder / "sweep.json", json.dumps(result, indent=2, ensure_ascii=False))
        write_whole(sweep.folder / "sweep.csv", _csv(rows))
        draw_sweep(curves, sweep.folder / "sweep.png")
    say()
    print_sweep(rows)
    say()
    for job, why in failed.items():
        complain(f"{job.label}: {why}")
    say(f"sweep.csv, sweep.json and the plot: {sweep.folder / 'sweep.png'}")


def _measured(row: Row, failed: dict[Job, str]) -> dict[str, Any]:
    """The results of a row: the numbers of every run, and each number's mean and standard deviation over the seeds."""
    runs = []
    for cell in row.cells:
        run: dict[str, Any] = {"seed": cell.seed, "path": str(cell.training.path), "numbers": _numbers(cell, failed)}
        errors = [failed[job] for job in (cell.training, cell.evaluation) if job in failed]
        runs.append(run | ({"error": errors[0]} if errors else {}))
    values: dict[str, list[float]] = {}
    for run in runs:
        for metric, value in run["numbers"].items():
            values.setdefault(metric, []).append(value)
    statistics = {
        # The deviation of a sample divides by n - 1; one seed has none.
        metric: {"mean": fmean(found), "std": stdev(found) if len(found) > 1 else None, "n": len(found)}
        for metric, found in values.items()
    }
    return {"label": row.label, "stage": row.stage, "settings": row.settings, "numbers": statistics, "runs": runs}


def _numbers(cell: Cell, failed: dict[Job, str]) -> dict[str, float]:
    """The results of a run's stage, and those of its eval as `eval/NAME`; a failed job has no results."""
    found: dict[str, Any] = {}
    if cell.training not in failed:
        manifest = read_manifest(cell.training.path)
        found |= manifest["results"] | {"wall_seconds": manifest["wall_seconds"]}
    if cell.evaluation is not None and cell.evaluation not in failed:
        measured = read_json(cell.evaluation.path / "eval.json")
        found |= {f"eval/{key}": value for key, value in measured["models"][cell.training.stage].items()}
    return {key: value for key, value in found.items() if isinstance(value, (int, float))}


def _csv(rows: list[dict[str, Any]]) -> str:
    """One line per row: its settings, number of runs and of failed runs, mean and deviation of every result."""
    settings = dict.fromkeys(key for row in rows for key in row["settings"])
    metrics = dict.fromkeys(metric for row in rows for metric in row["numbers"])
    statistics = [(metric, what) for metric in metrics for what in ("mean", "std", "n")]
    lines = [["stage", *settings, "seeds", "failed", *(f"{metric}_{what}" for metric, what in statistics)]]
    for row in rows:
        line = [row["stage"], *(row["settings"].get(key) for key in settings)]
        line += [len(row["runs"]), sum("error" in run for run in row["runs"])]
        lines.append(line + [row["numbers"].get(metric, {"n": 0}).get(what) for metric, what in statistics])
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(lines)
    return buffer.getvalue()


def _chosen_stages(recipe: Recipe, stages: list[str]) -> list[str]:
    names = [name.strip() for given in stages for name in given.split(",")]
    there = [stage for stage in recipe.stages() if stage in TRAINED]
    if unknown := [name for name in names if name not in there]:
        raise RecipeError(f"--stage {', '.join(unknown)}: recipe {recipe.name} has: {', '.join(there)}.")
    chosen = [stage for stage in there if stage in (names or ON_POLICY)]
    if not chosen:
        missing = " or ".join(ON_POLICY)
        raise RecipeError(f"recipe {recipe.name} has no stage {missing}; name a stage: --stage {there[0]}.")
    return chosen


def _sections(recipe: Recipe, stage: str, with_eval: bool) -> set[str]:
    """The parts of a recipe that the results of a stage and of its eval depend on."""
    own = only_stage(recipe, stage)
    waiting, seen, sections = [stage, *(["eval"] if with_eval and stage in ON_POLICY else [])], set(), set()
    while waiting:
        name = waiting.pop()
        if name in Recipe.model_fields and name not in seen:
            seen.add(name)
            sections |= set(sections_of(name))
            waiting += input_stages(own if name in (stage, "eval") else recipe, name)
    return sections
