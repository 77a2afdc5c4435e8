"""Names of the files in a run's folder, and readers of them."""

from pathlib import Path
from typing import Any

from rlhf_recipes.launch.start import USER_ERROR
from rlhf_recipes.recipe.schema import Recipe, RecipeError
from rlhf_recipes.system.files import read_json, read_log
from rlhf_recipes.system.terminal import complain

MANIFEST = "manifest.json"

COPY = "manifest_copy.json"
"""In a checkpoint: the manifest when it was saved."""

METRICS, COMPLETIONS = "metrics.jsonl", "completions.jsonl"

SCORING = "scoring.json"
"""Beside a reward model: the format of text that it reads, see `rewards.scoring`."""

REWARD_REPORT = "reward_report.json"
"""Beside a reward model: how well it tells chosen texts from rejected ones."""

VALUE_MODEL = "value_model"
"""Folder beside a policy of PPO: its value network."""

MERGED_BASE = "base"
"""Folder beside an adapter: its base model, if no other folder holds that."""

PARTS = "parts"
"""Folder in a run without checkpoints: complete files that the same run reuses after a stop."""


def run_path(recipe: Recipe, stage: str) -> Path:
    return Path(recipe.runs_dir) / recipe.name / stage


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a run folder; None if there is none.

    Raises:
        RecipeError: It is damaged.
    """
    file = path / MANIFEST
    if not file.is_file():
        return None
    manifest = read_json(file)
    if not isinstance(manifest.get("status"), str):
        raise RecipeError(f"{file} is damaged: it has no status; give the command of its run again.")
    return manifest


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The logged lines of the run in a folder."""
    return read_log(path / METRICS, needed=("step",))


def audit_file(path: Path) -> Path:
    """The file with the audit of the run in a folder."""
    path = path.resolve()
    return path.parent / "audit" / f"{path.name}.json"


def read_audit(path: Path) -> dict[str, Any] | None:
    """The audit of the run in a folder; None if there is none, or only that of an earlier run in this folder."""
    file = audit_file(path)
    if not file.is_file():
        return None
    manifest, found = read_manifest(path) or {}, read_json(file)
    return found if found.get("id") == manifest.get("id") else None


def is_finished(path: Path) -> bool:
    manifest = read_manifest(path)
    return manifest is not None and manifest["status"] == "finished"


def exit_code(code: int, path: Path) -> int:
    """The exit code of a stage's process; 0 is an error if its run has not finished.

    A function that leaves by `os._exit(0)`, or a library that does, ends the process as if it had succeeded.
    """
    if code == 0 and not is_finished(path):
        complain(
            f"stage {path.name} ended with exit code 0 but did not finish: a function or a library ended it.   {path}"
        )
        return USER_ERROR
    return code


def require_stage(recipe: Recipe, stage: str, key: str) -> Path:
    """The folder of a finished stage that another stage builds on.

    Raises:
        RecipeError: That stage has not finished; the message has the command that runs it.
    """
    path = run_path(recipe, stage)
    if is_finished(path):
        return path
    state = "was not finished" if path.exists() else "has not run"
    if getattr(recipe, stage, None) is None:
        raise RecipeError(f"{key}: stage:{stage}: recipe {recipe.name} has no stage {stage}.")
    raise RecipeError(
        f"{key}: stage {stage} of {recipe.name} {state} ({path}). First: rlhf-recipes {stage} {recipe.name}"
    )
