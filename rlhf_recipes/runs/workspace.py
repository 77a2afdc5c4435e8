"""W&B: a saved view of a recipe's runs, with PPO and RLOO overlaid (`rlhf-recipes wandb NAME`)."""

import os
import shlex
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlhf_recipes.pages.metrics import TRAINING
from rlhf_recipes.recipe.schema import ON_POLICY, Recipe, RecipeError
from rlhf_recipes.runs.files import run_path
from rlhf_recipes.runs.trackers import PROJECT, wandb_mode
from rlhf_recipes.system.terminal import say


def view_sections(reward_names: Iterable[str]) -> dict[str, list[str]]:
    """Section of the view -> the metrics that it plots over episodes."""
    sections: dict[str, list[str]] = {}
    for name, metric in TRAINING.items():
        if metric.section:
            sections.setdefault(metric.section, []).append(name)
    sections["Score"] += [f"score/{name}" for name in dict.fromkeys(reward_names)]
    return sections


def save_view(recipe: Recipe, group: str | None) -> str:
    """Save a view of the ppo and rloo runs of one group, with the range over seeds; returns its address.

    The group is W&B's, such as a duel's; None: the recipe's name, the group of its own runs.

    Raises:
        RecipeError: A package, a login or the server is missing.
    """
    if offline := offline_runs(recipe):
        say(f"{len(offline)} offline runs are not uploaded to W&B yet; upload them with")
        say(f"  wandb sync {shlex.join(map(str, offline))}")
    if find_spec("wandb_workspaces") is None:
        raise RecipeError("wandb: a view needs one more package: pip install 'rlhf-recipes[workspace]'.")
    mode, why_not = wandb_mode()
    if mode != "online":
        raise RecipeError(f"wandb: a view is saved on W&B's server, and {why_not or 'WANDB_MODE is offline'}.")
    import wandb
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr

    group = group or os.environ.get("WANDB_RUN_GROUP") or recipe.name
    sections = [
        ws.Section(name=section, panels=[_plot(metric) for metric in metrics], is_open=True)
        for section, metrics in view_sections(spec.name.rpartition(":")[2] for spec in recipe.reward_funcs).items()
    ]
    tables: list[Any] = [
        wr.WeavePanelSummaryTable(table_name="completions"),
        wr.WeavePanelSummaryTable(table_name="models"),
    ]
    sections.append(ws.Section(name="Completions; what eval measured", panels=tables, is_open=True))
    try:
        entity = os.environ.get("WANDB_ENTITY") or wandb.Api(timeout=20).default_entity
        if entity is None:
            raise RecipeError("wandb: your account has no default entity; set WANDB_ENTITY to your name or a team's.")
        view = ws.Workspace(
            entity=entity,
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=f"{group}: PPO and RLOO",
            sections=sections,
            settings=ws.WorkspaceSettings(x_axis="train/episodes"),
            runset_settings=ws.RunsetSettings(
                filters=[expr.Metric("Group") == group, expr.Metric("JobType").isin([*ON_POLICY, "eval"])],
                groupby=[expr.Metric("JobType")],
            ),
        )
        return view.save().url
    except (wandb.Error, OSError, ValueError) as error:
        raise RecipeError(f"wandb: the view was not saved: {str(error).splitlines()[0]}") from error


def _plot(metric: str):
    import wandb_workspaces.reports.v2 as wr

    return wr.LinePlot(
        title=metric,
        x="train/episodes",
        y=[f"train/{metric}"],
        groupby="JobType",
        groupby_aggfunc="mean",
        groupby_rangefunc="minmax",
    )


def offline_runs(recipe: Recipe) -> list[Path]:
    """Folders of W&B runs that are written offline and not uploaded yet, including those of duels and sweeps."""
    root = run_path(recipe, "ppo").parent
    found = sorted(root.glob("**/wandb/offline-run-*"))
    return [path for path in found if not list(path.glob("*.synced"))]
