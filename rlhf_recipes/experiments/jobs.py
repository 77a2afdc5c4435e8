"""Jobs of a sweep or a duel: a job is a stage of a run, or of several runs. Jobs run one after another."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_recipes.experiments.grid import short_hash
from rlhf_recipes.launch.start import STOP_CODES, launch_stage
from rlhf_recipes.recipe.graph import eval_models, eval_reference, input_stages, sections_of
from rlhf_recipes.recipe.load import to_yaml
from rlhf_recipes.recipe.schema import ON_POLICY, TRAINED, Recipe, RecipeError
from rlhf_recipes.recipe.secrets import HANDED_ON, secrets_in
from rlhf_recipes.recipe.trust import refuse_uploads
from rlhf_recipes.runs.files import MANIFEST, exit_code, read_manifest, run_path
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.system.files import write_whole, writing
from rlhf_recipes.system.terminal import complain, say


@dataclass(eq=False)
class Job:
    """One stage of one run, and the jobs that must finish before it."""

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
    """Collects jobs. Runs that start from a stage with the same settings share its job, in the folder `shared`."""

    def __init__(self, shared: Path):
        self.shared, self.jobs = shared, []
        self._by_settings: dict[tuple[str, str], Job] = {}

    def train(
        self, recipe: Recipe, stage: str, place: dict[str, Any], label: str, with_eval: bool = True
    ) -> tuple[Job, list[Job]]:
        """Adds the training of a stage; also returns the jobs that its eval needs.

        Args:
            recipe: Its other stages are trained with its own seed.
            stage: The stage.
            place: `runs_dir` and `name` of the run, and perhaps another `seed`.
            label: Name of the job in messages.
            with_eval: True: the run's recipe also serves its eval and its audit.
        """
        linked, needs = self.linked(recipe, only_stage(recipe, stage).model_copy(update=place), stage, (stage,))
        job, for_eval = self.add(Job(stage, linked, label, needs)), []
        if with_eval:
            job.recipe, for_eval = self.linked(recipe, linked, "eval", ("eval",), own=stage)
        return job, for_eval

    def cell(self, recipe: Recipe, stage: str, place: dict[str, Any], label: str, with_eval: bool) -> Cell:
        """Adds a stage's training and, for an on-policy stage, its eval."""
        with_eval, label = with_eval and stage in ON_POLICY, f"{label} seed={recipe.seed}"
        training, for_eval = self.train(recipe, stage, place, label, with_eval)
        if not with_eval:
            return Cell(recipe.seed, training, None)
        self.jobs.append(Job("eval", training.recipe, f"{label}: eval", [training, *for_eval]))
        return Cell(recipe.seed, training, self.jobs[-1])

    def add(self, job: Job) -> Job:
        self.jobs.append(job)
        self._by_settings[job.stage, _settings_hash(job)] = job
        return job

    def linked(
        self, recipe: Recipe, target: Recipe, stage: str, above: tuple[str, ...], own: str = ""
    ) -> tuple[Recipe, list[Job]]:
        """`target` with a job's folder in place of each `stage:` reference of a stage, except to `own`; and the jobs."""
        jobs = {name: self._prerequisite(recipe, name, above) for name in input_stages(target, stage) if name != own}
        folders = {f"stage:{name}": str(job.path) for name, job in jobs.items()}
        values = target.model_dump()
        for section in sections_of(stage):
            values[section] = _replaced(values[section], folders)
        return Recipe.model_validate(values), list(jobs.values())

    def _prerequisite(self, recipe: Recipe, stage: str, above: tuple[str, ...]) -> Job:
        if stage not in TRAINED or getattr(recipe, stage) is None:
            raise RecipeError(
                f"{recipe.name}: stage {above[-1]} needs stage:{stage}, but the recipe has no stage {stage}."
            )
        if stage in above:
            raise RecipeError(f"{recipe.name}: stages need each other in a circle: {' -> '.join([*above, stage])}.")
        linked, needs = self.linked(recipe, only_stage(recipe, stage), stage, (*above, stage))
        job = Job(stage, linked, f"{stage} seed={recipe.seed}", needs)
        settings = _settings_hash(job)
        if (stage, settings) in self._by_settings:
            return self._by_settings[stage, settings]
        place = {"runs_dir": str(self.shared), "name": f"{stage}-seed_{recipe.seed}-{settings}"}
        job.recipe = linked.model_copy(update=place)
        return self.add(job)


def refuse_other_settings(name: str, jobs: list[Job], overwrite: bool) -> None:
    """Refuses to start if a job's folder holds a run with other settings.

    Args:
        name: Name of the recipe, for the message.
        jobs: The jobs.
        overwrite: True: such runs are moved aside instead.

    Raises:
        RecipeError: Names every such folder; or the recipe uploads.
    """
    findings = []
    for job in jobs:
        refuse_uploads(job.recipe, [job.stage], push=False)
        try:
            Run(job.recipe, job.stage).is_done(overwrite)
        except RecipeError as error:
            findings.append(str(error).partition("\nKeep both")[0])  # that hint is about a single run
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
    """Runs the unfinished jobs one after another. After a failure, only the jobs that need the failed one are left out.

    Args:
        what: `sweep` or `duel`, for messages.
        jobs: The jobs, in an order in which they can run.
        failed: Failed job -> the reason; new failures are added.
        folder: Folder of the sweep or duel, for messages.
        overwrite: True: runs with other settings are moved aside.
        config: See `launch_stage`.

    Returns:
        0, or the exit code of a stopped stage, after which no job starts.
    """
    for i, job in enumerate(jobs, 1):
        head = f"[{i}/{len(jobs)}] {job.label}"
        missing = [needed.label for needed in job.needs if needed in failed]
        if missing:
            failed[job] = f"not run, because {missing[0]} failed"
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
        if code in STOP_CODES:
            say(f"{what} stopped after {i - 1} of {len(jobs)} jobs; the same command resumes it   {folder}")
            return code
        if code != 0:
            failed[job] = why
    return 0


def _run(job: Job, overwrite: bool, config: Path | None) -> tuple[int, str]:
    """Runs a job; returns its exit code, and the reason if it failed."""
    before = _text_of(job.path / MANIFEST)
    file = job.path.parent / "recipe.yaml"
    with writing("the run's recipe", file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, to_yaml(job.recipe))
    os.environ[HANDED_ON] = json.dumps(secrets_in(job.recipe.model_dump(exclude_none=True)))
    try:
        code = exit_code(launch_stage(job.stage, str(file), [], overwrite, config), job.path)
    finally:
        del os.environ[HANDED_ON]
    if _text_of(job.path / MANIFEST) in (None, before):
        return code, f"exit code {code} before the run began; see its message above"
    manifest = read_manifest(job.path) or {}
    said = first_line(manifest["error"]) if "error" in manifest else f"exit code {code}"
    return code, f"{said}   {job.path / 'log.txt'}"


def _text_of(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def only_stage(recipe: Recipe, stage: str) -> Recipe:
    """The recipe without its other stages; its eval measures this stage and the reference model."""
    changes: dict[str, Any] = {other: None for other in TRAINED if other != stage}
    if recipe.eval.models is not None or recipe.eval.reference is not None:
        reference = eval_reference(recipe)
        models = {reference: eval_models(recipe)[reference]} | {stage: f"stage:{stage}"}
        changes["eval"] = recipe.eval.model_copy(update={"models": models})
    return recipe.model_copy(update=changes)


def _settings_hash(job: Job) -> str:
    return short_hash(json.dumps(Run(job.recipe, job.stage).settings, sort_keys=True))


def _replaced(values: Any, by: dict[str, str]) -> Any:
    """A copy of nested lists and dictionaries with replaced strings."""
    if isinstance(values, dict):
        return {key: _replaced(value, by) for key, value in values.items()}
    if isinstance(values, list):
        return [_replaced(value, by) for value in values]
    return by.get(values, values) if isinstance(values, str) else values


def first_line(text: str) -> str:
    return text.splitlines()[0] if text else ""
