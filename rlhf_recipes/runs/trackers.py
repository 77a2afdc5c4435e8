"""Trackers beside the run's own files: TensorBoard always, W&B when it need not ask for a login, others by name."""

import logging
import os
import shlex
from pathlib import Path
from typing import Any

from rlhf_recipes.recipe.schema import Recipe, RecipeError
from rlhf_recipes.system.files import read_json, read_lines
from rlhf_recipes.system.terminal import say

logger = logging.getLogger(__name__)

PROJECT = "rlhf_recipes"
"""Of W&B and Trackio, unless the user says otherwise."""

LIMITS = {"init_timeout": 20, "finish_timeout": 300}
"""Seconds that W&B's server may keep us waiting, at a run's start and for the last of its data; W&B's: 90, for ever."""

TABLE_ROWS = 500
"""Most rows of a table of completions that eval or a comparison sends."""


def chosen_trackers(stage: str, given: Any) -> list[str]:
    """What `report_to` of transformers becomes.

    Args:
        stage: Of the recipe.
        given: The recipe's `<stage>.trainer.report_to`; None: W&B where it can be used.

    Raises:
        RecipeError: A tracker was asked for by name, and cannot be used.
    """
    key = f"{stage}.trainer.report_to"
    if given is None:
        return ["tensorboard"] + (["wandb"] if wandb_mode()[0] else [])
    names = [given] if isinstance(given, str) else list(given)
    others = list(dict.fromkeys(name for name in names if name not in ("tensorboard", "none")))
    if "all" in others:
        raise RecipeError(f"{key}: all is whatever is installed; name what you want, such as [wandb, trackio].")
    _check_known(key, others)
    if "wandb" in others:
        mode, why_not = wandb_mode()
        if mode is None and os.environ.get("WANDB_MODE") == "disabled":
            others.remove("wandb")
        elif mode is None:
            raise RecipeError(f"{key}: W&B cannot be used: {why_not}.")
    return ["tensorboard", *others]


def _check_known(key: str, names: list[str]) -> None:
    """Refuse trackers that transformers does not know, or that are not installed, before models are loaded."""
    from transformers.integrations import get_available_reporting_integrations, integration_utils

    known = integration_utils.INTEGRATION_TO_CALLBACK
    if unknown := [name for name in names if name not in known]:
        raise RecipeError(f"{key}: no tracker is called {unknown[0]!r}; there are: none, {', '.join(sorted(known))}.")
    # transformers does not list Flyte among those that it can find.
    if missing := set(names) - set(get_available_reporting_integrations()) - {"flyte"}:
        raise RecipeError(f"{key}: {min(missing)} is not installed; pip install its package, or take it out.")


def wandb_mode() -> tuple[str | None, str]:
    """How W&B can be used without a question to anybody: `online` or `offline`; or None, and why not."""
    import wandb

    mode = _hushed().mode
    if mode == "disabled":
        return None, "WANDB_MODE is disabled"
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes"):  # transformers' way until its version 5
        return None, "WANDB_DISABLED is set"
    if mode in ("offline", "dryrun"):
        return "offline", ""
    try:
        if wandb.login(prompt=False, verify=False):
            return "online", ""
    except wandb.Error as error:  # half a key
        logger.warning("W&B is not used: %s", error)
        return None, str(error).rstrip(".")
    logger.info("W&B is not used: nobody is logged in, and WANDB_MODE is not offline.")
    return None, "nobody is logged in (wandb login, or WANDB_API_KEY), and WANDB_MODE is not offline"


def _hushed() -> Any:
    """W&B's settings; what it says goes where all else goes: to log.txt, and warnings to the terminal."""
    import wandb

    try:
        settings = wandb.setup(wandb.Settings(silent=True)).settings
    except (ValueError, wandb.Error) as error:  # pydantic's; W&B's own, of names that it does not take
        raise RecipeError(
            f"W&B does not take a value of your environment or of its settings file: {' '.join(str(error).split())}"
        ) from error
    wandb.termsetup(settings, logger)
    logger.addFilter(_matters)
    return settings


def _matters(record: logging.LogRecord) -> bool:
    return "URL not available in offline run" not in record.getMessage()  # TRL's model card asks at each checkpoint


def start_wandb(recipe: Recipe, stage: str, folder: Path, run_id: str | None) -> Any:
    """Start a run of W&B's, with our names where the user's environment variables have none.

    A server that cannot be reached, or that refuses the key, is worth a warning, and the run goes on offline.

    Args:
        recipe: Its name is the run's group.
        stage: The run's job type; stages of recipes, and `duel`.
        folder: Where W&B writes its own files.
        run_id: The same one goes on with the same run; None: a new run.

    Returns:
        W&B's run; None where W&B cannot be used.
    """
    import wandb

    mode, _ = wandb_mode()
    if mode is None:
        return None

    def ours(variable: str, value: Any) -> Any:
        return None if os.environ.get(variable) else value  # None: W&B takes the variable

    arguments = {
        "project": ours("WANDB_PROJECT", PROJECT),
        "group": ours("WANDB_RUN_GROUP", recipe.name),
        "job_type": ours("WANDB_JOB_TYPE", stage),
        "name": ours("WANDB_NAME", run_name(recipe, stage)),
        "tags": ours("WANDB_TAGS", [recipe.name[:64], stage]),  # W&B's limit
        "dir": ours("WANDB_DIR", str(folder)),
        "id": ours("WANDB_RUN_ID", run_id),
        "resume": ours("WANDB_RESUME", "allow"),
        "config": {"recipe": recipe.model_dump(exclude_none=True), "stage": stage},
        "settings": wandb.Settings(
            **{name: value for name, value in LIMITS.items() if f"WANDB_{name.upper()}" not in os.environ}
        ),
    }
    try:
        started = wandb.init(**arguments, mode=mode)
    except wandb.Error as error:
        logger.warning("W&B: %s; this run is written offline.", str(error).splitlines()[0].rstrip("."))
        wandb.teardown()  # or the run's id would still be in use
        _hushed()
        mode, started = "offline", wandb.init(**arguments, mode="offline")
    command = f"wandb sync {shlex.quote(str(Path(started.dir).parent))}"
    where = started.url if mode == "online" else f"offline, upload it with: {command}"
    say(f"{stage:<8} W&B: {where}")
    return started


def run_name(recipe: Recipe, stage: str) -> str:
    return f"{recipe.name} {stage} seed {recipe.seed}"


def log_eval(recipe: Recipe, folder: Path, run_id: str) -> None:
    """Send to W&B, where it is in use, what eval has written to its folder: summary and two tables."""
    tracked = start_wandb(recipe, "eval", folder, run_id)
    if tracked is None:
        return
    measured = read_json(folder / "eval.json")["models"]
    lines = read_lines(folder / "completions.jsonl", TABLE_ROWS)
    tracked.summary.update({f"{name}/{key}": value for name, of in measured.items() for key, value in of.items()})
    tracked.log(
        {
            "models": as_table([{"model": name} | of for name, of in measured.items()]),
            "completions": as_table([_side_by_side(line) for line in lines]),
        }
    )
    tracked.finish()


def _side_by_side(line: dict[str, Any]) -> dict[str, Any]:
    row = {key: as_cell(line[key]) for key in ("prompt", "reference") if key in line}
    for name, said in line["models"].items():
        row[name] = as_cell(said["completion"])
        row |= {f"{name} {key}": said[key] for key in ("score", "held_out") if key in said}
    return row


def log_comparison(recipe: Recipe, stage: str, folder: Path) -> None:
    """Send to W&B, where it is in use, the `comparison.json` in a folder: the verdict, and a table of its views.

    Args:
        recipe: Whose runs were compared.
        stage: `compare` or `duel`.
        folder: With the comparison.
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
    """Rows of texts and numbers as a table of W&B's; a row without one of the columns has none there."""
    import wandb

    columns = list(dict.fromkeys(key for row in rows for key in row))
    return wandb.Table(columns, [[row.get(column) for column in columns] for row in rows])


def as_cell(message: str | list[dict]) -> str:
    """A prompt or completion as text; of chat messages, each with its role, for a table has no cell for a list."""
    if isinstance(message, str):
        return message
    return "\n".join(f"{part['role']}: {part.get('content') or ''}" for part in message)  # a tool's call has none
