"""Names of the files in a run's folder, and readers of them."""

import json
from pathlib import Path
from typing import Any

from rlhf_recipes.recipe.schema import Recipe, RecipeError
from rlhf_recipes.system.files import read_json, read_lines

MANIFEST = "manifest.json"

PARTS = "parts"
"""Folder in that of a run without checkpoints: whole files, each of which the same run need not make again."""


def run_path(recipe: Recipe, stage: str) -> Path:
    return Path(recipe.runs_dir) / recipe.name / stage


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a run folder; None when there is none."""
    try:
        return json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except json.JSONDecodeError as error:
        raise RecipeError(
            f"{path / MANIFEST} is damaged ({error}); delete the folder {path} and run its stage again."
        ) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """What the run in a folder has logged, a line for each time."""
    return read_lines(path / "metrics.jsonl")


def audit_file(path: Path) -> Path:
    """Where the audit of the run in a folder stands."""
    path = path.resolve()
    return path.parent / "audit" / f"{path.name}.json"


def read_audit(path: Path) -> dict[str, Any] | None:
    """The audit of the run in a folder; None where there is none, or only one of an earlier run in the folder."""
    file = audit_file(path)
    if not file.is_file():
        return None
    manifest, found = read_manifest(path) or {}, read_json(file)
    return found if found["id"] == manifest.get("id") else None


def is_finished(path: Path) -> bool:
    manifest = read_manifest(path)
    return manifest is not None and manifest["status"] == "finished"


def require_stage(recipe: Recipe, stage: str, key: str) -> Path:
    """The folder of a finished stage that another one builds on.

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
