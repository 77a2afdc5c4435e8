"""Trackers besides the run's own files: TensorBoard always, W&B if it needs no login prompt, others by name."""

import logging
import os
import shlex
from pathlib import Path
from typing import Any, Literal

from rlhf_recipes.recipe.messages import with_roles
from rlhf_recipes.recipe.schema import Recipe, RecipeError
from rlhf_recipes.recipe.secrets import redacted
from rlhf_recipes.runs.files import COMPLETIONS
from rlhf_recipes.system.files import read_json, read_lines
from rlhf_recipes.system.terminal import say

logger = logging.getLogger(__name__)

PROJECT = "rlhf_recipes"
"""Default project of W&B and Trackio."""

LIMITS = {"init_timeout": 20, "finish_timeout": 300}
"""Longest wait for W&B's server in seconds, at a run's start and at its end; W&B's own: 90 and no limit."""

TABLE_ROWS = 500
"""Most rows in the table of completions that eval sends."""


def chosen_trackers(stage: str, given: Any) -> list[str]:
    """The value of transformers' `report_to` for a recipe's own value `given`; None: W&B if it can be used.

    Raises:
        RecipeError: The recipe names a tracker that cannot be used.
    """
    key = f"{stage}.trainer.report_to"
    if given is None:
        return ["tensorboard"] + (["wandb"] if wandb_mode()[0] else [])
    names = [given] if isinstance(given, str) else list(given)
    others = list(dict.fromkeys(name for name in names if name not in ("tensorboard", "none")))
    _check_installed(key, others)
    if "wandb" in others:
        mode, why_not = wandb_mode()
        if mode is None and os.environ.get("WANDB_MODE") == "disabled":
            others.remove("wandb")
        elif mode is None:
            raise RecipeError(f"{key}: W&B cannot be used: {why_not}.")
    return ["tensorboard", *others]


def _check_installed(key: str, names: list[str]) -> None:
    """Refuse trackers that are unknown to transformers or not installed, before models are loaded."""
    from transformers.integrations import get_available_reporting_integrations, integration_utils

    known = integration_utils.INTEGRATION_TO_CALLBACK
    if unknown := [name for name in names if name not in known]:
        raise RecipeError(f"{key}: no tracker is called {unknown[0]!r}; there are: none, {', '.join(sorted(known))}.")
    # transformers never lists Flyte as available.
    if missing := set(names) - set(get_available_reporting_integrations()) - {"flyte"}:
        raise RecipeError(f"{key}: {min(missing)} is not installed; pip install its package, or remove it.")


def wandb_mode() -> tuple[Literal["online", "offline"] | None, str]:
    """The mode in which W&B works without a prompt, `online` or `offline`; else None, and the reason."""
    import wandb

    mode = _quiet_settings().mode
    if mode == "disabled":
        return None, "WANDB_MODE is disabled"
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes"):  # the way of transformers 4
        return None, "WANDB_DISABLED is set"
    if mode in ("offline", "dryrun"):
        return "offline", ""
    try:
        if wandb.login(prompt=False, verify=False):
            return "online", ""
    except wandb.Error as error:  # an invalid key
        logger.warning("W&B is not used: %s", error)
        return None, str(error).rstrip(".")
    logger.info("W&B is not used: nobody is logged in, and WANDB_MODE is not offline.")
    return None, "nobody is logged in (wandb login, or WANDB_API_KEY), and WANDB_MODE is not offline"


def _quiet_settings() -> Any:
    """W&B's settings, with its messages sent to log.txt, and its warnings to the terminal too."""
    import wandb

    try:
        settings = wandb.setup(wandb.Settings(silent=True)).settings
    except (ValueError, wandb.Error) as error:  # pydantic's; W&B's own, of a name
        raise RecipeError(
            f"W&B refuses a value in your environment or its settings file: {' '.join(str(error).split())}"
        ) from error
    wandb.termsetup(settings, logger)
    logger.addFilter(_is_relevant)
    return settings


def _is_relevant(record: logging.LogRecord) -> bool:
    return "URL not available in offline run" not in record.getMessage()  # TRL's model card asks for the URL


def start_wandb(recipe: Recipe, stage: str, folder: Path, run_id: str | None) -> Any:
    """Start a W&B run. The user's environment variables override our names.

    If the server cannot be reached or refuses the key, the run continues offline, with a warning. An existing `run_id`
    continues that W&B run. `stage` may be `duel` too.

    Returns:
        W&B's run; None if W&B cannot be used.
    """
    import wandb

    mode, _ = wandb_mode()
    if mode is None:
        return None

    def default(variable: str, value: Any) -> Any:
        return None if os.environ.get(variable) else value  # None: W&B reads the variable

    arguments = {
        "project": default("WANDB_PROJECT", PROJECT),
        "group": default("WANDB_RUN_GROUP", recipe.name),
        "job_type": default("WANDB_JOB_TYPE", stage),
        "name": default("WANDB_NAME", run_name(recipe, stage)),
        "tags": default("WANDB_TAGS", [recipe.name[:64], stage]),  # W&B's limit
        "dir": default("WANDB_DIR", str(folder)),
        "id": default("WANDB_RUN_ID", run_id),
        "resume": default("WANDB_RESUME", "allow"),
        "config": {"recipe": redacted(recipe.model_dump(exclude_none=True)), "stage": stage},
        "settings": wandb.Settings(
            **{name: value for name, value in LIMITS.items() if f"WANDB_{name.upper()}" not in os.environ}
        ),
    }
    try:
        started = wandb.init(**arguments, mode=mode)
    except wandb.Error as error:
        logger.warning("W&B: %s; this run is written offline.", str(error).splitlines()[0].rstrip("."))
        wandb.teardown()  # frees the run's id
        _quiet_settings()
        mode, started = "offline", wandb.init(**arguments, mode="offline")
    command = f"wandb sync {shlex.quote(str(Path(started.dir).parent))}"
    where = started.url if mode == "online" else f"offline, upload it with: {command}"
    say(f"{stage:<8} W&B: {where}")
    return started


def run_name(recipe: Recipe, stage: str) -> str:
    return f"{recipe.name} {stage} seed {recipe.seed}"


def log_eval(recipe: Recipe, folder: Path, run_id: str) -> None:
    """Send eval's summary and two tables to W&B, if it is in use."""
    tracked = start_wandb(recipe, "eval", folder, run_id)
    if tracked is None:
        return
    measured = read_json(folder / "eval.json")["models"]
    lines = read_lines(folder / COMPLETIONS, TABLE_ROWS)
    tracked.summary.update({f"{name}/{key}": value for name, of in measured.items() for key, value in of.items()})
    tracked.log(
        {
            "models": as_table([{"model": name} | of for name, of in measured.items()]),
            "completions": as_table([_side_by_side(line) for line in lines]),
        }
    )
    tracked.finish()


def _side_by_side(line: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {key: with_roles(line[key]) for key in ("prompt", "gold") if key in line}
    for name, said in line["models"].items():
        row[name] = with_roles(said["completion"])
        row |= {f"{name} {key}": said[key] for key in ("score", "held_out") if key in said}
    return row


def log_comparison(recipe: Recipe, stage: str, folder: Path) -> None:
    """Send the verdict and the views of the `comparison.json` in a folder to W&B, if it is in use.

    The stage is `compare` or `duel`.
    """
    tracked = start_wandb(recipe, stage, folder, None)
    if tracked is None:
        return
    comparison = read_json(folder / "comparison.json")
    tracked.summary.update({f"verdict/{key}": value for key, value in comparison["verdict"].items()})
    rows = []
    for view in comparison["views"]:
        low, high = view["interval"] or (None, None)
        means = {f"{name} mean": mean for name, mean in view["means"].items()}
        shown = {key: view[key] for key in ("view", "metric", "at", "difference")}
        rows.append(shown | {"low": low, "high": high, "label": view["label"], "sentence": view["sentence"]} | means)
        tracked.summary.update({f"{view['view']}/{view['metric']}/difference": view["difference"]})
    tracked.log({"views": as_table(rows)})
    tracked.finish()


def as_table(rows: list[dict[str, Any]]) -> Any:
    """Rows of texts and numbers as a W&B table; cells without a value stay empty."""
    import wandb

    columns = list(dict.fromkeys(key for row in rows for key in row))
    return wandb.Table(columns, [[row.get(column) for column in columns] for row in rows])
