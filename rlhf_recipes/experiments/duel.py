"""PPO against RLOO on one task: several seeds of each at the same budget, one eval of all, and a verdict.

    rlhf-recipes duel imdb_tiny --seeds 4 --episodes 4096

All seeds start from one SFT model and one reward model, trained with the recipe's own seed:

    <runs_dir>/<recipe>/duel/ppo-seed_42/{recipe.yaml,ppo/}, <runs_dir>/<recipe>/duel/rloo-seed_42/{recipe.yaml,rloo/}
    <runs_dir>/<recipe>/duel/eval/                                      all models, on the same held-out prompts
    <runs_dir>/<recipe>/duel/{comparison.json,report.html,report.md}    and pictures
    <runs_dir>/<recipe>/sweep-shared/{sft,reward}-seed_42-<hash of its settings>/

If `--episodes` or an override changes a setting, the folder is `duel-<hash of the settings>`.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from rlhf_recipes.comparison.build import build_comparison
from rlhf_recipes.comparison.differences import DURATION, SAME_BUDGET, find_differences
from rlhf_recipes.comparison.runs import TrainedRun, read_runs
from rlhf_recipes.comparison.write import notes_on, write_comparison
from rlhf_recipes.evaluation.audit.audit import audit_runs
from rlhf_recipes.experiments.grid import parse_seeds, short_hash
from rlhf_recipes.experiments.jobs import Job, Planner, refuse_other_settings, run_jobs
from rlhf_recipes.pages.tables import print_comparison
from rlhf_recipes.recipe.batch import rows_of_rollout, trainer_settings
from rlhf_recipes.recipe.graph import eval_models
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.recipe.schema import Recipe, RecipeError
from rlhf_recipes.runs.files import read_audit, read_manifest
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.runs.trackers import log_comparison
from rlhf_recipes.stage import load_checked
from rlhf_recipes.system.files import writing
from rlhf_recipes.system.terminal import complain, say

STAGES = ("ppo", "rloo")

AUDIT_PROMPTS = 128
"""Held-out prompts that the audit gives to every checkpoint."""


@dataclass
class Duel:
    """The jobs of a duel.

    Attributes:
        folder: Folder of its runs and of the comparison.
        planner: Has the jobs.
        trained: Name of a model in eval -> the job that trains it.
    """

    recipe: Recipe
    folder: Path
    planner: Planner
    trained: dict[str, Job]

    def evaluation(self, failed: dict[Job, str]) -> Job:
        """One eval of all trained models, and of the recipe's other models."""
        models = {name: ref for name, ref in eval_models(self.recipe).items() if ref not in ("stage:ppo", "stage:rloo")}
        models = models or {"sft": self.recipe.ppo.policy}  # otherwise the first run would be the reference
        models |= {name: str(job.path) for name, job in self.trained.items() if job not in failed}
        place = {"runs_dir": str(self.folder.parent), "name": self.folder.name}
        target = self.recipe.model_copy(update=place | {"eval": self.recipe.eval.model_copy(update={"models": models})})
        linked, needs = self.planner.linked(self.recipe, target, "eval", ("eval",))
        return Job("eval", linked, "eval of all", needs)


def plan_duel(
    name: str,
    overrides: list[str],
    seeds: str,
    episodes: int | None = None,
    overwrite: bool = False,
    processes: int = 1,
) -> Duel:
    """Checks every run of a duel before the first one starts.

    Args:
        name: Name of a recipe, or path of a YAML file.
        overrides: `dotted.key=value` each.
        seeds: See `parse_seeds`.
        episodes: Completions that each run samples. None: the recipe's.
        overwrite: True: runs with other settings are moved aside.
        processes: Number of processes that train each run.

    Raises:
        RecipeError: A run has an error, or the two algorithms would not be comparable.
    """
    recipe = load_checked(name, overrides if episodes is None else [*overrides, f"episodes={episodes}"])
    _check(recipe, processes)
    numbers = parse_seeds(seeds, recipe.seed)
    root = Path(recipe.runs_dir) / recipe.name
    settings = _settings(recipe)
    is_unchanged = settings == _settings(load_recipe(name))
    folder = root / ("duel" if is_unchanged else f"duel-{short_hash(settings)}")
    duel = Duel(recipe, folder, Planner(root / "sweep-shared"), {})
    for seed in numbers:
        for stage in STAGES:
            place = {"runs_dir": str(folder), "name": f"{stage}-seed_{seed}", "seed": seed}
            duel.trained[place["name"]], _ = duel.planner.train(recipe, stage, place, f"{stage} seed={seed}")
    duel.evaluation({})  # adds the jobs that the eval needs
    _refuse_unequal(duel)
    _refuse_other_batches(duel, processes)
    refuse_other_settings(recipe.name, duel.planner.jobs, overwrite)
    return duel


def _check(recipe: Recipe, processes: int) -> None:
    findings = [
        f"recipe {recipe.name} has no stage {s}, so there is no duel." for s in STAGES if not getattr(recipe, s)
    ]
    if recipe.episodes is None:
        findings.append(f"recipe {recipe.name} has no episodes, so that budgets would be unequal; add --episodes N.")
    for stage in STAGES:
        given = getattr(recipe, stage).trainer if getattr(recipe, stage) else {}
        findings += [
            f"{stage}.trainer.{key}: it would replace the duel's episodes; add {stage}.trainer.{key}=null."
            for key in DURATION
            if given.get(key) is not None
        ]
    if findings:
        raise RecipeError("\n".join(findings))
    rollouts = [_rollout(recipe, stage, processes) for stage in STAGES]
    sampled = [math.ceil(recipe.episodes / rollout) * rollout for rollout in rollouts]
    if max(sampled) - min(sampled) > SAME_BUDGET * max(sampled):
        raise RecipeError(
            f"episodes: in whole rollouts, {recipe.episodes} are {sampled[0]} for ppo (rollouts of {rollouts[0]}) and "
            f"{sampled[1]} for rloo (of {rollouts[1]}); take a multiple of {math.lcm(*rollouts)}, such as --episodes "
            f"{math.ceil(recipe.episodes / math.lcm(*rollouts)) * math.lcm(*rollouts)}."
        )


def _rollout(recipe: Recipe, stage: str, processes: int) -> int:
    """Completions that all processes of a stage sample at once."""
    return rows_of_rollout(trainer_settings(recipe, stage, processes), processes, f"{stage}.trainer.")


def _settings(recipe: Recipe) -> str:
    values = recipe.model_dump(mode="json", exclude={"name", "description", "runs_dir"})
    return json.dumps(values, sort_keys=True)


def _refuse_unequal(duel: Duel) -> None:
    """Refuses runs that a comparison would refuse."""
    planned = []
    for name, job in list(duel.trained.items())[: len(STAGES)]:
        settings = json.loads(json.dumps(Run(job.recipe, job.stage).settings))
        run = TrainedRun(job.stage, job.path, {"stage": job.stage, "seed": job.recipe.seed, "settings": settings}, {})
        run.name = name
        planned.append(run)
    lines, same = [], ""
    for difference in find_differences(planned):
        if difference["refuses"]:
            key, (ppo, rloo) = difference["key"], difference["values"].values()
            lines.append(f"  {key} ({difference['kind']}): ppo {ppo!r}, rloo {rloo!r}")
            same = same or " ".join(f"{stage}.{key}={json.dumps(ppo)}" for stage in STAGES)
    if lines:
        raise RecipeError(
            "\n".join([f"{duel.recipe.name}: ppo and rloo would differ in more than the algorithm:", *lines])
            + f"\nGive both the same, such as {same}."
        )


def _refuse_other_batches(duel: Duel, processes: int) -> None:
    """Refuses new seeds with another batch size than the finished seeds."""
    for job in duel.trained.values():
        manifest = read_manifest(job.path)
        if manifest is None or manifest["status"] != "finished" or getattr(job.recipe, job.stage).global_batch_size:
            continue
        before = manifest.get("setup", {}).get("num_processes", processes)
        if before != processes:
            raise RecipeError(
                f"{job.path}: {before} {'process' if before == 1 else 'processes'} trained it, but this duel has "
                f"{processes}, which changes the batch; launch it as before, or start a new duel: add name="
                f"{duel.recipe.name}-2."
            )


def run_duel(duel: Duel, overwrite: bool = False, config: Path | None = None) -> int:
    """Trains the unfinished runs, measures and compares all of them, and prints the verdict.

    Args:
        duel: From `plan_duel`.
        overwrite: True: runs with other settings are moved aside.
        config: See `launch_stage`.

    Returns:
        Exit code: 0; 1 if a run failed or the runs cannot be compared; or the exit code of a stopped stage.
    """
    group = duel.recipe.name if duel.folder.name == "duel" else f"{duel.recipe.name} {duel.folder.name}"
    os.environ.setdefault("WANDB_RUN_GROUP", group)
    failed: dict[Job, str] = {}
    code = run_jobs("duel", duel.planner.jobs, failed, duel.folder, overwrite, config)
    if code != 0:
        return code
    there = {name: job for name, job in duel.trained.items() if job not in failed}
    for job, why in failed.items():
        complain(f"{job.label}: {why}")
    if not there:
        complain(f"no run has finished, so there is nothing to compare   {duel.folder}")
        return 1
    # An eval of fewer seeds, or of older runs, is moved aside.
    evaluation = duel.evaluation(failed)
    code = run_jobs("duel", [evaluation], failed, duel.folder, overwrite=True)
    if code != 0:
        return code
    if evaluation in failed:
        complain(f"{evaluation.label}: {failed[evaluation]}")
    notes = _notes(duel, failed) + _audited([job.path for job in there.values()])
    runs, _ = read_runs([str(job.path) for job in there.values()])
    trained = [f"{job.label} failed: {failed[job]}" for job in duel.trained.values() if job in failed]
    comparison = build_comparison(runs, f"{duel.recipe.name}: PPO and RLOO", notes, trained)
    with writing("the comparison", duel.folder):
        write_comparison(duel.folder, comparison)
    log_comparison(duel.recipe, "duel", duel.folder)
    print_comparison(comparison, duel.folder / "report.html")
    return 1 if failed or not comparison["comparable"] else 0


def _audited(paths: list[Path]) -> list[str]:
    """Audits the runs that have no audit; an error becomes a note, and the comparison goes on."""
    new = [path for path in paths if read_audit(path) is None]
    try:
        if new:
            say(f"audit of {len(new)} runs")
            audit_runs(new, AUDIT_PROMPTS)
    except RecipeError as error:
        complain(str(error))
        return [f"No audit: {error}"]
    return []


def _notes(duel: Duel, failed: dict[Job, str]) -> list[str]:
    paths = {job.stage: job.path for job in duel.planner.jobs}
    nowhere = duel.folder / "none"
    notes = notes_on(paths.get("sft", nowhere), paths.get("reward", nowhere))
    shown = duel.trained.values()  # whose failures the comparison names
    return [*notes, *(f"Failed: {job.label}: {why}." for job, why in failed.items() if job not in shown)]
