"""Jobs of a sweep or a duel: one stage of one run each, made once for all that build on it, run one after another."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_recipes.experiments.grid import short_hash
from rlhf_recipes.launch.start import INTERRUPTED, STOPPED, launch_stage
from rlhf_recipes.recipe.graph import eval_models, eval_reference, input_stages, sections_of
from rlhf_recipes.recipe.load import to_yaml
from rlhf_recipes.recipe.schema import ON_POLICY, TRAINED, Recipe, RecipeError
from rlhf_recipes.runs.files import read_manifest, run_path
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.system.files import write_whole, writing
from rlhf_recipes.system.terminal import complain, say


@dataclass(eq=False)
class Job:
    """One stage of one run."""

    stage: str
    recipe: Recipe
    label: str
    needs: list["Job"]

    @property
    def path(self) -> Path:
        return run_path(self.recipe, self.stage)


@dataclass
class Cell:
    """One setting with one seed."""

    seed: int
    training: Job
    evaluation: Job | None


class Planner:
    """Collects jobs; a stage that others build on is one job for each of its settings."""

    def __init__(self, shared: Path):
        self.shared, self.jobs = shared, []
        self._by_settings: dict[tuple[str, str], Job] = {}

    def cell(self, recipe: Recipe, stage: str, folder: Path, name: str, label: str, with_eval: bool) -> Cell:
        own = only_stage(recipe, stage).model_copy(update={"runs_dir": str(folder), "name": name})
        label = f"{label} seed={recipe.seed}"
        linked, needs = self.linked(recipe, own, stage, (stage,))
        training = self.add(Job(stage, linked, label, needs))
        if not with_eval or stage not in ON_POLICY:
            return Cell(recipe.seed, training, None)
        linked, needs = self.linked(recipe, linked, "eval", ("eval",), own=stage)
        training.recipe = linked  # one file serves both
        evaluation = Job("eval", linked, f"{label}: eval", [training, *needs])
        self.jobs.append(evaluation)
        return Cell(recipe.seed, training, evaluation)

    def add(self, job: Job) -> Job:
        self.jobs.append(job)
        self._by_settings[job.stage, _settings_hash(job)] = job
        return job

    def linked(
        self, recipe: Recipe, target: Recipe, stage: str, above: tuple[str, ...], own: str = ""
    ) -> tuple[Recipe, list[Job]]:
        """`target` with the folder of a job in place of every `stage:` reference of a stage but those to `own`."""
        jobs = {name: self._prerequisite(recipe, name, above) for name in input_stages(target, stage) if name != own}
        folders = {f"stage:{name}": str(job.path) for name, job in jobs.items()}
        values = target.model_dump()
        for section in sections_of(stage):
            values[section] = _replaced(values[section], folders)
        return Recipe.model_validate(values), list(jobs.values())

    def _prerequisite(self, recipe: Recipe, stage: str, above: tuple[str, ...]) -> Job:
        if stage not in TRAINED or getattr(recipe, stage) is None:
            raise RecipeError(f"{recipe.name}: stage {above[-1]} builds on stage:{stage}, but it has no stage {stage}.")
        if stage in above:
            raise RecipeError(f"{recipe.name}: stages build on one another: {' -> '.join([*above, stage])}.")
        linked, needs = self.linked(recipe, only_stage(recipe, stage), stage, (*above, stage))
        job = Job(stage, linked, f"{stage} seed={recipe.seed}", needs)
        settings = _settings_hash(job)
        if (stage, settings) in self._by_settings:
            return self._by_settings[stage, settings]
        place = {"runs_dir": str(self.shared), "name": f"{stage}-seed_{recipe.seed}-{settings}"}
        job.recipe = linked.model_copy(update=place)
        return self.add(job)


def refuse_other_settings(name: str, jobs: list[Job], overwrite: bool) -> None:
    """Refuse to start where folders hold runs with other settings.

    Args:
        name: Of the recipe, for the message.
        jobs: Whose folders.
        overwrite: Whether such runs are moved aside; then they are none to refuse.

    Raises:
        RecipeError: Names each of them.
    """
    findings = []
    for job in jobs:
        try:
            Run(job.recipe, job.stage).is_done(overwrite)
        except RecipeError as error:
            findings.append(str(error).partition("\nKeep both")[0])  # that names the run, not the recipe
    if findings:
        hint = f"Keep both: add name={name}-2 (or runs_dir=...). Move the old ones aside: add --overwrite."
        raise RecipeError("\n".join([*findings, hint]))


def run_jobs(
    what: str,
    jobs: list[Job],
    failed: dict[Job, str],
    folder: Path,
    overwrite: bool = False,
    config: Path | None = None,
) -> int:
    """Run what has not finished yet, one after another; what fails stops only what needs it.

    Args:
        what: What the jobs are parts of, for messages.
        jobs: Each behind what it needs.
        failed: Jobs that failed, with the reason; those that do now are added.
        folder: Of the whole, for messages.
        overwrite: Whether runs with other settings are moved aside.
        config: See `launch_stage`.

    Returns:
        0, or the exit code of a stage that was asked to stop, with which all ends.
    """
    for i, job in enumerate(jobs, 1):
        head = f"[{i}/{len(jobs)}] {job.label}"
        missing = [needed.label for needed in job.needs if needed in failed]
        if missing:
            failed[job] = f"not run, for want of {missing[0]}"
            continue
        try:
            if Run(job.recipe, job.stage).is_done(overwrite):
                say(f"{head}: reused, finished before   {job.path}")
                continue
            say(head)
            code, why = _run(job, overwrite, config)
        except RecipeError as error:
            code, why = 1, first_line(str(error))
            complain(str(error))
        if code in (STOPPED, INTERRUPTED):
            say(f"{what} stopped after {i - 1} of {len(jobs)}; the same command goes on with it   {folder}")
            return code
        if code != 0:
            failed[job] = why
    return 0


def _run(job: Job, overwrite: bool, config: Path | None) -> tuple[int, str]:
    """Exit code of a job, and why it failed."""
    before = read_manifest(job.path)
    file = job.path.parent / "recipe.yaml"
    with writing("the run's recipe", file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, to_yaml(job.recipe))
    code = launch_stage(job.stage, str(file), [], overwrite, config)
    manifest = read_manifest(job.path)
    if manifest in (None, before):
        return code, f"exit code {code}, before it began; its message stands above"
    said = first_line(manifest["error"]) if "error" in manifest else f"exit code {code}"
    return code, f"{said}   {job.path / 'log.txt'}"


def only_stage(recipe: Recipe, stage: str) -> Recipe:
    """The recipe without its other stages; eval then measures this one, against what it refers to."""
    changes: dict[str, Any] = {other: None for other in TRAINED if other != stage}
    if recipe.eval.models is not None or recipe.eval.reference is not None:
        reference = eval_reference(recipe)
        models = {reference: eval_models(recipe)[reference]} | {stage: f"stage:{stage}"}
        changes["eval"] = recipe.eval.model_copy(update={"models": models})
    return recipe.model_copy(update=changes)


def _settings_hash(job: Job) -> str:
    return short_hash(json.dumps(Run(job.recipe, job.stage).settings, sort_keys=True))


def _replaced(values: Any, by: dict[str, str]) -> Any:
    """A nested structure in which some strings are replaced by others."""
    if isinstance(values, dict):
        return {key: _replaced(value, by) for key, value in values.items()}
    if isinstance(values, list):
        return [_replaced(value, by) for value in values]
    return by.get(values, values) if isinstance(values, str) else values


def first_line(text: str) -> str:
    return text.splitlines()[0] if text else ""
